"""How examples are laid out for the backbone."""

import torch

from megaptune.backbone import packed_attention
from megaptune.backbone.inputs import pack, pad

CPU = torch.device("cpu")
LONG, SHORT, OTHER = [-1, -2, 5, 6, 7, -3], [-1, -2, 5, 8], [-4, 9, 9]


def test_padding_stands_on_the_right():
    inputs = pad([[7, -1], [7, -1, 8, -2]], [1, 2], 99, masked=False, device=CPU)
    assert inputs.slots.tolist() == [[7, -1, 99, 99], [7, -1, 8, -2]]
    assert inputs.attention_mask is None  # a causal model needs none
    masked = pad([[7, -1], [7, -1, 8, -2]], [1, 2], 99, masked=True, device=CPU)
    assert masked.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_packed_tokens_have_no_padding_and_keep_their_positions():
    packed = pack([LONG, OTHER], [5, 2], [0, 0], masked=False, device=CPU)
    assert packed.slots.tolist() == [LONG + OTHER]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert packed.answers.tolist() == [5, 8]
    assert packed.places[packed.order].tolist() == list(range(9))
    assert packed.visible[1].int().tolist()[:3] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_leading_tokens_of_a_group_stand_once_in_front():
    packed = pack([LONG, SHORT, OTHER, SHORT], [5, 3, 2, 3], [0, 0, 0, 1], masked=False, device=CPU, share_leads=True)
    assert packed.leads is None  # OTHER begins otherwise, and the last one is alone in its group
    packed = pack([LONG, SHORT, OTHER, OTHER], [5, 3, 2, 2], [0, 0, 1, 1], masked=False, device=CPU, share_leads=True)
    assert packed.slots.tolist() == [[-1, -2, 5, -4, 9, 6, 7, -3, 8, 9, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 3, 4, 5, 3, 2, 2]]
    assert packed.answers.tolist() == [7, 8, 9, 10]
    assert packed.leads.tolist() == [0, 0, 0, 0, 1, 1]
    assert packed.prefix_length == 3
    assert packed.visible[2, 0].int().tolist() == [1, 1, 1, 1, 0, 0]  # its prefix and itself
    assert packed.visible[4, 0].int().tolist() == [1, 1, 0, 1, 0, 0]  # a shorter prefix


def test_a_deep_prompt_stands_before_what_a_group_shares():
    given = {"masked": False, "device": CPU, "share_leads": True, "virtual_tokens": 2}
    packed = pack([LONG, SHORT, OTHER, OTHER], [5, 3, 2, 2], [0, 0, 1, 1], prompts=[4, 4, 9, 9], **given)
    assert packed.slots.tolist() == [[-1, -2, 5, -4, 9, 6, 7, -3, 8, 9, 9]]
    assert packed.positions.tolist() == [[2, 3, 4, 2, 3, 5, 6, 7, 5, 4, 4]]
    assert packed.prompts.tolist() == [4, 9, 4, 4, 9, 9]  # the shared tokens' own, then the examples'
    assert (packed.prefix_length, packed.lead_length) == (5, 3)
    assert packed.visible[0, 0].int().tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    assert packed.visible[2, 0].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert packed.visible[4, 0].int().tolist() == [1, 1, 1, 1, 0, 1, 0, 0]


def test_an_answers_own_token_is_never_shared():
    packed = pack([SHORT, SHORT], [3, 3], [0, 0], masked=False, device=CPU, share_leads=True)
    assert packed.slots.tolist() == [[-1, -2, 5, 8, 8]]
    assert packed.answers.tolist() == [3, 4]


def test_kept_tokens_are_left_out():
    packed = pack([[5, 6, -1], [7, -1, -2], OTHER], [2, 2, 2], [0, 0, 0], masked=False, device=CPU, contexts=[2, 1, 0])
    assert packed.slots.tolist() == [[-1, -1, -2, *OTHER]]
    assert packed.positions.tolist() == [[2, 1, 2, 0, 1, 2]]
    assert packed.contexts == [(5, 6), (7,), ()]
    assert packed.visible[:, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_padding_that_is_asked_for_counts_nothing():
    packed = pack([LONG, OTHER], [5, 2], [0, 0], masked=False, device=CPU, pad_id=0)
    assert packed.slots.tolist() == [[*LONG, *OTHER, 0, 0, 0]]
    assert packed.visible[1, 2].int().tolist() == [1, 1, 1, 0, 0, 0]
    assert packed.answers.tolist() == [5, 8]


def test_attention_behind_a_context_is_torchs_attention_over_both():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    context = torch.randn(2, 2, 3, 5, 16)
    mask = torch.zeros(2, 1, 8, 9).masked_fill_(torch.rand(2, 1, 8, 9) < 0.3, float("-inf"))
    mask[..., 0] = 0
    wanted = torch.nn.functional.scaled_dot_product_attention(
        queries, torch.cat([context[0], keys], 2), torch.cat([context[1], values], 2), attn_mask=mask, scale=0.3
    )
    for fused in (False, True):
        found = packed_attention._behind_context(queries, keys, values, context, mask, 0.3, fused)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_an_example_may_be_read_at_several_positions():
    padded = pad([LONG, OTHER], [[2, 5], [1]], 99, masked=False, device=CPU)
    assert (padded.answer_positions.tolist(), padded.rows.tolist()) == ([2, 5, 1], [0, 0, 1])
    packed = pack([LONG, OTHER], [[2, 5], [1]], [0, 0], masked=False, device=CPU)
    assert packed.answers.tolist() == [2, 5, 7]


def test_no_position_that_is_read_is_shared():
    """Both would begin with five tokens; the first is read at the third."""
    packed = pack([LONG, LONG], [[2, 5], [5]], [0, 0], masked=False, device=CPU, share_leads=True)
    assert packed.slots.tolist() == [[*LONG[:2], *LONG[2:], *LONG[2:]]]
    assert packed.answers.tolist() == [2, 5, 9]
