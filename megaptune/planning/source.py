"""Where a plan finds a backbone's config.json: in its folder, or where that is not, as ``backbone.architecture``."""

from dataclasses import dataclass
from pathlib import Path

from megaptune.backbone.description import BackboneDescription, Kind, context_length, read_config, resolve_kind
from megaptune.backbone.embedded import cache_directory, embedded_folder, is_embedded
from megaptune.backbone.weight_files import has_weights
from megaptune.config import Config
from megaptune.errors import BackboneError
from megaptune.planning.layout import Machines, parse_size, this_machine
from megaptune.planning.workload import Shapes

ASSUMED_TOKENS = 64  # LAMA's longest inputs have some 55
ASSUMED_WORDS = 20_000  # of a word list that are one token
ASSUMED_DEVICE_BYTES = 80 * 2**30


@dataclass(frozen=True)
class Source:
    """folder: holds config.json and perhaps more; weights: whether they are there too."""

    folder: Path
    name: str
    kind: Kind
    max_tokens: int
    weights: bool

    def shapes(self, config: Config) -> Shapes:
        return Shapes(self.folder, self.kind, config.backbone.dtype, config.backbone.random_weights is not None)

    def description(self, shapes: Shapes) -> BackboneDescription:
        """As :func:`megaptune.backbone.description.describe_backbone`, without files of weights."""
        largest = max(parameter.numel() for parameter in shapes.model.parameters())
        unused = getattr(shapes.config, "unused_token_ids", None) or []
        return BackboneDescription(self.folder, shapes.family, self.kind, self.max_tokens, 0, largest, unused)


def assumed_tokens(config: Config) -> int:
    """The longest input where no data was read: what the patterns of SuperGLUE's tasks allow, else LAMA's."""
    return max((config.patterns[name].max_tokens for name in config.tasks), default=ASSUMED_TOKENS)


def find_backbone(config: Config) -> Source:
    """:raises BackboneError: when there is no config.json in either place."""
    path = config.backbone.path
    if is_embedded(path):
        folder = cache_directory() / path
        folder = folder if folder.is_dir() else embedded_folder()
    else:
        folder = Path(path)
    here = (folder / "config.json").is_file()
    if not here:
        given = config.backbone.architecture
        if given is None:
            raise BackboneError(
                f"backbone.path: {folder} has no config.json; to plan without the backbone, name a folder that has its "
                "config.json as backbone.architecture"
            )
        folder = given.parent if given.is_file() else given
        if not (folder / "config.json").is_file():
            raise BackboneError(f"backbone.architecture: {folder} has no config.json")
    settings = read_config(folder)
    kind = resolve_kind(settings, config.backbone.kind, folder)
    weights = here and has_weights(folder)
    return Source(folder, Path(path).name, kind, context_length(settings), weights)


def planned_machines(nodes: int, ranks_per_node: int, memory: str | None, host_memory: str | None) -> Machines:
    """The machines asked for; where no memory is given, nodes like this one.

    :raises ValueError: for a size that is none.
    """
    import torch

    cuda = torch.cuda.is_available()
    if memory is None:
        return this_machine(nodes * ranks_per_node, ranks_per_node, cuda)
    host = parse_size(host_memory) if host_memory else None
    return Machines(nodes, ranks_per_node, parse_size(memory), host, "cuda")
