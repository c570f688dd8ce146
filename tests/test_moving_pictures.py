"""Pairs with exact flow: the flow leads from one frame to the other, pairs are repeatable, what is hidden is marked."""

import torch

from energynet.energies import warp
from energynet.experiments.data.moving_pictures import MovingPictures


def pictures() -> MovingPictures:
    """Smooth pictures, which interpolation hardly changes."""
    rows, columns = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    smooth = [0.5 + 0.2 * torch.sin(columns / a) * torch.cos(rows / b) for a, b in ((9.0, 14.0), (15.0, 8.0), (11.0, 11.0))]
    return MovingPictures([one[None] for one in smooth], size=(72, 96), pace=0.2)


def test_the_flow_leads_from_one_frame_to_the_other() -> None:
    for seed in (0, 3, 4, 5):
        pair = pictures().pair(seed)
        moved, seen = warp(pair.second[None], pair.flow[None])[0], pair.visible
        correlation, still = (
            torch.corrcoef(torch.stack([frame[seen], pair.first[seen]]))[0, 1] for frame in (moved, pair.second)
        )
        assert float(correlation) > 0.95 and float(correlation) > float(still)


def test_a_seed_gives_the_same_pair_again_and_another_seed_another() -> None:
    one, again, other = (pictures().pair(seed) for seed in (3, 3, 4))
    assert torch.equal(one.first, again.first) and torch.equal(one.flow, again.flow)
    assert not torch.equal(one.flow, other.flow)


def test_what_leaves_the_frame_is_hidden() -> None:
    pair = pictures().pair(5)
    rows, columns = torch.meshgrid(torch.arange(72.0), torch.arange(96.0), indexing="ij")
    x, y = columns + pair.flow[0], rows + pair.flow[1]
    outside = (x < -0.5) | (x > 95.5) | (y < -0.5) | (y > 71.5)
    assert bool(outside.any()) and not bool(pair.visible[0][outside].any())
    assert 0.5 < float(pair.visible.float().mean()) < 1


def test_the_pace_scales_motions() -> None:
    slow = pictures()
    fast = MovingPictures(slow.pictures, slow.size, pace=0.4)
    one, two = slow.pair(2).flow, fast.pair(2).flow
    assert 1.5 < float(two.norm() / one.norm()) < 2.5
