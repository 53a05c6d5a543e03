"""The correction of a body branch by what its pictures show (examples/tiny_family/calibrate_body.py)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_family"))
from calibrate_body import AXES, PENALTY, correction

from bolid.method.sliders import fit_readout


@pytest.fixture
def people():
    """Bodies [P, D], and ten ratios [P, R] of which six things can be known and a little cannot."""
    generator = torch.Generator().manual_seed(0)
    bodies = torch.randn(400, 24, generator=generator).double() @ torch.randn(24, 24, generator=generator).double()
    weight = torch.randn(10, AXES, generator=generator).double() @ torch.randn(AXES, 24, generator=generator).double()
    ratios = 0.3 + 0.02 * bodies @ weight.T
    return bodies, ratios + 0.05 * ratios.std(0) * torch.randn(ratios.shape, generator=generator).double()


def shown(bodies, known, ratios):
    """What pictures show that go two thirds of the way from the mean person, and then a little towards one of them."""
    return ratios.mean(0) + ratios.std(0) * (0.67 * known(bodies) + 0.3 * known(known.center + ratios.new_ones(24)))


def test_what_pictures_lack_is_made_up_for(people):
    bodies, ratios = people
    known = fit_readout(bodies, ratios, PENALTY)
    matrix, offset = correction(bodies, ratios, shown(bodies, known, ratios), part=1)
    wanted = ratios.mean(0) + ratios.std(0) * known(bodies)
    before = (shown(bodies, known, ratios) - wanted).std()
    after = (shown(bodies @ matrix.T + offset, known, ratios) - wanted).std()
    assert after < 0.1 * before


def test_part_says_how_much_is_stretched_away_and_the_common_error_goes_in_any_case(people):
    bodies, ratios = people
    known = fit_readout(bodies, ratios, PENALTY)
    spreads = []
    for part in (0, 0.5, 1):
        matrix, offset = correction(bodies, ratios, shown(bodies, known, ratios), part)
        seen = known(bodies @ matrix.T + offset)
        spreads.append(float((seen.std(0) / known(bodies).std(0)).mean()))
        middle = (shown(bodies @ matrix.T + offset, known, ratios) - ratios).mean(0) / ratios.std(0)
        assert float(middle.abs().max()) < 0.08, "the offset is solved for at the mean person"
    assert spreads[0] == pytest.approx(1)
    assert spreads[1] == pytest.approx((1 + spreads[2]) / 2, rel=0.02)
    assert spreads[2] == pytest.approx(1 / 0.67, rel=0.05)
