"""Loading a checkpoint over tensor-parallel ranks, beside what ``dd`` reads from the same cold file; peak host memory.

    python benchmarks/loading.py                          # 2.6 GB, two tensor-parallel ranks, five interleaved rounds
    python benchmarks/loading.py --zero-stage 3 --tensor-parallel 1

A synthetic Llama is written once. In each round the file is dropped from the page cache and read by ``dd``, dropped
again and loaded by all ranks together. Throughput of a load: the file's bytes over the time of the slowest rank's. A
rank's peak is the process's (interpreter and libraries included, some 0.35 GiB), after the weights are with DeepSpeed;
beside it the shard: the bytes of weights that the rank holds.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def write_checkpoint(folder: Path, layers: int) -> Path:
    """A Llama of width 2048 in fp32, one file, written layer by layer; about 0.2 GB a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=layers,
        vocab_size=42000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    from megaptune.backbone.loading import build_on_meta

    model, _ = build_on_meta(folder, "causal", "fp32")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = torch.randn(parameter.shape, generator=generator) * 0.02 + (1.0 if "norm" in name else 0.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drop_from_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def dd(file: Path) -> float:
    """GB/s of a sequential read of the whole file."""
    drop_from_cache(file)
    done = subprocess.run(
        ["dd", f"if={file}", "of=/dev/null", "bs=4M"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    )
    seconds = re.search(r"copied, ([\d.e-]+) s", done.stderr)
    assert seconds is not None
    return file.stat().st_size / 1e9 / float(seconds[1])


def load(folder: Path, ranks: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What every rank says of its load, from a cold file."""
    drop_from_cache(folder / "model.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--worker", str(folder), "--tensor-parallel", str(arguments.tensor_parallel)]
    command += ["--zero-stage", str(arguments.zero_stage)]
    workers = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a rank failed; its message stands above")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def work(folder: Path, arguments: argparse.Namespace) -> None:
    """One rank: host the backbone and say what it took."""
    sys.path.insert(0, str(ROOT))
    import torch

    from megaptune.backbone.description import describe_backbone
    from megaptune.backbone.host import BackboneHost
    from megaptune.config import ParallelConfig
    from megaptune.run.grid import build_grid
    from megaptune.run.monitor import peak_host_bytes
    from megaptune.run.topology import connect, disconnect

    parallel = ParallelConfig(tensor_parallel=arguments.tensor_parallel, zero_stage=arguments.zero_stage)
    topology = connect()
    torch.distributed.barrier()
    description = describe_backbone(folder, "causal")
    host = BackboneHost(description, "fp32", parallel, build_grid(topology, parallel.tensor_parallel), topology.device)
    held = sum(
        getattr(parameter, "ds_tensor", parameter).numel() * parameter.itemsize
        for parameter in host.module.parameters()
    )
    answer = {"held": held, "read": host.load_report.bytes_read, "seconds": host.load_report.seconds}
    disconnect()
    print(json.dumps({**answer, "peak": peak_host_bytes()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--layers", type=int, default=11, help="11: 2.6 GB")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = write_checkpoint(Path(scratch) / "model", arguments.layers)
        file = folder / "model.safetensors"
        size = file.stat().st_size
        layout = f"tensor parallel {arguments.tensor_parallel}, ZeRO {arguments.zero_stage}, {arguments.ranks} ranks"
        print(f"{size / 1e9:.2f} GB, {layout}")
        ratios = []
        for number in range(arguments.rounds):
            raw = dd(file)
            answers = load(folder, arguments.ranks, arguments)
            speed = size / 1e9 / max(answer["seconds"] for answer in answers)
            ratios.append(speed / raw)
            print(f"round {number + 1}: dd {raw:.2f} GB/s, load {speed:.2f} GB/s, ratio {speed / raw:.2f}")
        print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        for rank, answer in enumerate(answers):
            over = (answer["peak"] - answer["held"]) / GIB
            print(
                f"rank {rank}: read {answer['read'] / GIB:.2f} GiB, holds {answer['held'] / GIB:.2f} GiB, "
                f"peak {answer['peak'] / GIB:.2f} GiB = shard + {over:.2f} GiB"
            )
    return None


if __name__ == "__main__":
    main()
