"""Shapes: conditioning on measurements, body vectors, editing, what people type, and the population."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bolid.body.body_vector import KIND, BodyVectors, fit, load_body_vectors, save_body_vectors
from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS, bounds
from bolid.body.profiles import body_from_measurements, body_from_vector, body_prior, read_known, read_targets, table
from bolid.body.shape import (
    POWERS,
    Known,
    Shape,
    condition,
    draw,
    edit,
    jacobian,
    measure_body,
    measured,
    names_of,
    of_sex,
    population,
    state_of,
    within_bounds,
)
from bolid.errors import BolidError
from bolid.run import run_record

P, S, D = len(PARAMETERS), len(PARAMETERS) + len(NAMES), 12


def size(shape: Shape, name: str) -> float:
    return float(measure_body(shape.mean[None])[0, NAMES.index(name)])


def refused(call, *arguments, **options) -> str:
    with pytest.raises(BolidError) as error:
        call(*arguments, **options)
    return f"{error.value.message} | {error.value.hint}"


def test_the_population_is_of_adults_and_training_seeds():
    people = population()
    low, high = bounds()
    assert (low <= people.mean).all() and (people.mean <= high).all()
    assert people.record["config"]["seeds"][1] <= 100_000
    assert 1.6 < people.mean[0] < 1.8
    middle = people.quantiles[0, 50]
    assert people.percentile(middle, gender=1.0) == pytest.approx(np.full(len(NAMES), 50.0), abs=1)
    women, men = (people.percentile(np.median(people.quantiles, (0, 1)), g)[0] for g in (1.0, 0.0))
    assert women > 50 > men  # a stature between the two is tall for a woman


def test_the_slope_is_that_of_the_mesh():
    """Against differences through the mesh, where a parameter moves a measurement."""
    at = of_sex(population().shape, "woman").mean
    slope = jacobian(at)
    for parameter, name in (("weight", "waist"), ("measure-waist-circ-incr", "waist"), ("stature", "inseam")):
        step = np.zeros(P)
        step[PARAMETERS.index(parameter)] = 0.1
        more, less = measure_body(np.stack([at + step, at - step]))[:, NAMES.index(name)]
        found = slope[NAMES.index(name), PARAMETERS.index(parameter)]
        assert found == pytest.approx((more - less) / 0.2, rel=0.6), parameter


def test_conditioning_meets_the_measurements_through_the_mesh():
    known = {"height": Known(1.72, 0.005), "waist": Known(0.80, 0.01), "hip": Known(1.01, 0.01)}
    prior = body_prior("woman")
    shape = condition(prior, known)
    assert size(shape, "height") == pytest.approx(1.72, abs=0.003)
    assert size(shape, "waist") == pytest.approx(0.80, abs=0.006)
    assert size(shape, "hip") == pytest.approx(1.01, abs=0.006)
    before, after = measured(prior).sd, measured(shape).sd
    assert (after <= before + 1e-9).all()
    assert after[NAMES.index("waist")] < 0.0105 < before[NAMES.index("waist")]
    assert after[NAMES.index("thigh")] < 0.9 * before[NAMES.index("thigh")]  # what goes together is known better too
    assert np.linalg.eigvalsh(shape.covariance).min() > -1e-9
    low, high = bounds()
    assert (low <= shape.mean).all() and (shape.mean <= high).all()
    assert set(shape.known) == set(known)


def test_a_vague_measurement_counts_less():
    sure, vague = (condition(body_prior("man"), {"waist": Known(1.0, sd)}) for sd in (0.01, 0.2))
    middle = size(body_prior("man"), "waist")
    assert middle < size(vague, "waist") < size(sure, "waist") <= 1.001


def test_the_same_measurement_twice_is_one_of_half_the_variance():
    """Conditioning is Bayes' rule: in two steps or in one, where the mesh is linear enough."""
    twice = condition(condition(body_prior(), {"inseam": Known(0.80, 0.02)}), {"inseam": Known(0.80, 0.02)})
    once = condition(body_prior(), {"inseam": Known(0.80, 0.02 / np.sqrt(2))})
    assert size(twice, "inseam") == pytest.approx(size(once, "inseam"), abs=0.002)
    assert measured(twice).sd == pytest.approx(measured(once).sd, rel=0.05)


def test_sex_conditions_the_body():
    woman, man = of_sex(population().shape, "woman"), of_sex(population().shape, "man")
    assert size(man, "height") > size(woman, "height")
    assert size(man, "neck") / size(man, "height") > size(woman, "neck") / size(woman, "height")
    assert "choose woman or man" in refused(of_sex, population().shape, "cat")


def test_contradictions_are_refused_with_what_is_plausible():
    known = {"waist": Known(0.58, 0.01), "height": Known(1.72, 0.01), "inseam": Known(1.10, 0.01)}
    text = refused(condition, body_prior(), known)
    assert "no adult body of the population has waist 58 cm, height 172 cm, inseam 110 cm" in text
    assert "inseam is plausible from" in text and "standard deviations" in text


@pytest.mark.slow
def test_draws_of_a_conditioned_shape_agree_with_its_measurements():
    """The covariance says how far bodies drawn from the shape measure from its mean."""
    shape = condition(body_prior("woman"), {"height": Known(1.65, 0.005), "hip": Known(0.98, 0.01)})
    spread = measure_body(draw(shape, 60, 0)).std(0)
    stated = measured(shape).sd
    for name in ("inseam", "waist", "weight", "shoulders"):
        k = NAMES.index(name)
        assert 0.6 < spread[k] / stated[k] < 1.5, name


def test_editing_moves_one_and_holds_the_others():
    shape = condition(body_prior("woman"), {"height": Known(1.70, 0.005)})
    now = measure_body(shape.mean[None])[0]
    held = measure_body(edit(shape, {"waist": now[NAMES.index("waist")] - 0.04}).mean[None])[0]
    free = measure_body(edit(shape, {"waist": now[NAMES.index("waist")] - 0.04}, hold=False).mean[None])[0]
    assert held[NAMES.index("waist")] == pytest.approx(now[NAMES.index("waist")] - 0.04, abs=0.004)
    assert free[NAMES.index("waist")] == pytest.approx(now[NAMES.index("waist")] - 0.04, abs=0.004)
    k = NAMES.index("hip")
    assert abs(held[k] - now[k]) < 0.012 < now[k] - free[k]
    assert held[NAMES.index("inseam")] == pytest.approx(now[NAMES.index("inseam")], abs=0.01)
    assert "no body like this one has waist" in refused(edit, shape, {"waist": 0.3})


# ---- what people type ---------------------------------------------------------------------------------------------


def test_reading_measurements():
    known = read_known({"height": "172", "waist": "80±2", "weight": "64", "neck": "36+-0.5"})
    assert known["height"] == pytest.approx((1.72, 0.01)) and known["waist"] == pytest.approx((0.80, 0.02))
    assert known["weight"] == pytest.approx((64, 1.0)) and known["neck"] == pytest.approx((0.36, 0.005))
    assert read_known({"height": "68"}, "in")["height"].value == pytest.approx(1.7272)
    typed = {"height": "1.72 m", "waist": "80 ± 2 cm", "hip": "40in", "weight": "140lb"}
    known = read_known(typed)
    assert [entry.value for entry in known.values()] == pytest.approx([1.72, 0.80, 1.016, 63.5], abs=0.01)
    assert known["waist"].sd == pytest.approx(0.02)
    assert read_known({"weight": "140"}, "in")["weight"].value == pytest.approx(63.5, abs=0.1)
    for feet in ("5'8", "5' 8\"", "5ft8", "5 ft 8 in", "5′8″"):
        assert read_known({"height": feet})["height"] == pytest.approx((1.7272, 0.01)), feet
    assert read_known({"height": "6'"})["height"].value == pytest.approx(1.8288)
    assert read_known({"waist": "80,5±1,5"})["waist"] == pytest.approx((0.805, 0.015))


@pytest.mark.parametrize(
    "text", ["-80", "nan", "eighty", "", "80±-1", "80±0", "80±1±2", "0", "inf", "80kg", "80,", "8,0,5", "5'8kg"]
)
def test_measurements_that_are_no_numbers(text):
    assert "--waist is" in refused(read_known, {"waist": text})


def test_other_units_are_guessed():
    assert "it looks like inches: add --units in" in refused(read_known, {"height": "68"})
    assert "metres" in refused(read_known, {"height": "1.72"})
    assert "millimetres" in refused(read_known, {"height": "1720"})
    assert "centimetres" in refused(read_known, {"height": "172"}, "in")
    assert "it looks like centimetres, not metres" in refused(read_known, {"height": "172 m"})
    assert "pounds" in refused(read_known, {"weight": "220"})
    assert "like --height 169" in refused(read_known, {"height": "5'8'9"})
    assert "choose cm" in refused(read_known, {"height": "172"}, "furlong")
    assert "chest (bust girth)" in refused(read_known, {"bust": "10"})


def test_children_are_refused():
    assert "adults only" in refused(read_known, {"height": "110"})
    assert "out of an adult's range" in refused(read_known, {"chest": "52"})


def test_reading_changes():
    shape = body_prior("woman")
    now = measure_body(shape.mean[None])[0]
    targets = read_targets(shape, {"waist": "-4cm", "inseam": "+2sd", "hip": "101cm", "weight": "+3kg"})
    assert targets["waist"] == pytest.approx(now[NAMES.index("waist")] - 0.04)
    assert targets["hip"] == pytest.approx(1.01)
    assert targets["weight"] == pytest.approx(now[NAMES.index("weight")] + 3)
    assert 0.04 < targets["inseam"] - now[NAMES.index("inseam")] < 0.14
    for bad in ("-4", "cm", "-4kg", "2sd"):
        assert "sets nothing" in refused(read_targets, shape, {"waist": bad})


def test_the_table_says_what_was_given():
    shape = body_from_measurements(read_known({"height": "172", "waist": "80"}), "woman")
    rows = {row.name: row for row in table(shape)}
    assert rows["height"].value == pytest.approx(172, abs=0.5) and rows["height"].known
    assert not rows["hip"].known and rows["hip"].sd > rows["waist"].sd
    assert rows["height"].percentile > 80  # tall among women
    assert [row.unit for row in rows.values()].count("kg") == 1


# ---- body vectors -------------------------------------------------------------------------------------------------


def made_people(count: int, seed: int = 0) -> tuple[BodyVectors, np.ndarray, np.ndarray, dict]:
    """People whose vectors are linear in their states, as encoded from 1, 2 and 8 photos."""
    rng = np.random.default_rng(seed)
    people = population()
    scale = np.sqrt(np.diag(people.covariance))
    weight = rng.normal(size=(D, S)) / (scale + 1e-9) / 4
    weight[:, [0, P]] = 0
    start = np.concatenate([people.mean, np.zeros(S - P)])
    one = 0.5 * np.eye(D)
    truth = BodyVectors(
        weight, -weight @ start, 0.05 * np.eye(D), one, np.full(D, np.log(0.5)), np.full(D, np.log(0.1)), {}
    )
    states = rng.multivariate_normal(start, people.covariance, count, method="eigh")
    vectors = states @ weight.T + truth.bias + rng.normal(0, np.sqrt(0.05), (count, D))
    fused = {}
    for views in (1, 2, 8):
        precision = np.full((count, D), views / 0.5)
        seen = vectors + rng.normal(size=(count, D)) / np.sqrt(precision)
        fused[views] = (precision * seen / (1 + precision), -np.log(1 + precision))
    ratios = states[:, :P] @ people.slope.T + people.intercept + states[:, P:]
    return truth, states, ratios * states[:, :1] ** POWERS, fused


def test_fitting_finds_the_model_back():
    truth, states, sizes, fused = made_people(3000)
    weight, bias, noise, photo_noise, one_view, _ = fit(states[:, :P], sizes, fused, population().shape)
    scale = np.sqrt(np.diag(population().covariance))
    assert np.abs((weight - truth.weight) * scale).mean() < 0.05
    predicted, true = states @ weight.T + bias, states @ truth.weight.T + truth.bias
    assert np.mean((predicted - true) ** 2) < 0.03 * true.var()
    assert np.diag(noise).mean() == pytest.approx(0.05, rel=0.4)
    assert np.diag(photo_noise).mean() == pytest.approx(0.5, rel=0.15)
    assert one_view == pytest.approx(np.full(D, np.log(0.5)))


def test_vectors_that_say_nothing_of_the_shape_are_not_believed():
    """Slopes that noise alone reaches are taken out: the shape stays the population's."""
    _, states, sizes, fused = made_people(200)
    rng = np.random.default_rng(1)
    order = rng.permutation(200)
    shuffled = {n: (mean[order], logvar[order]) for n, (mean, logvar) in fused.items()}
    model = BodyVectors(*fit(states[:, :P], sizes, shuffled, population().shape), {})
    prior = population().shape
    _, covariance = model.posterior(prior, fused[8][0][0], fused[8][1][0])
    assert np.trace(covariance) > 0.8 * np.trace(prior.covariance)


def test_more_photos_say_more_and_intervals_hold():
    truth, states, _, fused = made_people(400, seed=3)
    prior = population().shape
    scale = np.sqrt(np.diag(prior.covariance))
    counts = np.r_[1:P, P + 1 : S]
    errors, inside = {}, {}
    for views, (mean, logvar) in fused.items():
        found = [truth.posterior(prior, m, v) for m, v in zip(mean, logvar, strict=True)]
        off = (np.stack([state for state, _ in found]) - states)[:, counts]
        sd = np.stack([np.sqrt(np.diag(covariance)) for _, covariance in found])[:, counts]
        errors[views] = np.mean((off / scale[counts]) ** 2)
        inside[views] = np.mean(np.abs(off) < sd)
    assert errors[8] < errors[2] < errors[1] < 1
    assert all(0.64 < part < 0.72 for part in inside.values())


def test_a_fit_on_few_people_knows_its_own_error():
    """The vectors of others lie as far from what is predicted as the noises say."""
    _, states, sizes, fused = made_people(520, seed=4)
    known, others = slice(0, 120), slice(120, None)
    some = {n: (mean[known], logvar[known]) for n, (mean, logvar) in fused.items()}
    weight, bias, noise, photo_noise, *_ = fit(states[known, :P], sizes[known], some, population().shape)
    for views, share in ((1, 1.0), (8, 1 / 8)):
        mean, logvar = (part[others] for part in fused[views])
        shown = mean / (1 - np.exp(logvar))  # without the encoder's prior
        off = shown - states[others] @ weight.T - bias
        spread = noise + share * photo_noise
        assert 0.85 < np.mean(off * np.linalg.solve(spread, off.T).T) < 1.15


def test_a_vector_within_the_population_says_the_same():
    """The population's part is taken out of the vectors of few photos, so nothing counts twice."""
    import torch

    from bolid.method.body_vae import BodyPrior, mean_under_prior

    truth, _, _, fused = made_people(40)
    covariance = np.cov(fused[8][0].T) + 0.1 * np.eye(D)
    people = (fused[8][0].mean(0), covariance)
    mean, logvar = fused[1][0][0], fused[1][1][0]
    tensors = BodyPrior(torch.from_numpy(people[0]), torch.from_numpy(covariance))
    within = mean_under_prior(torch.from_numpy(mean), torch.from_numpy(logvar), tensors).numpy()
    plain, _ = body_from_vector(truth, mean, logvar, 3, people=people)
    known, _ = body_from_vector(truth, within, logvar, 1, people=people)
    assert known.mean == pytest.approx(plain.mean, abs=1e-5)


def test_a_shape_and_its_vector_go_both_ways():
    truth, *_ = made_people(5)
    bodies = draw(population().shape, 2, 0)
    exact, other = (Shape(body, np.zeros((S, S))) for body in bodies)
    mean, logvar = truth.vector_of(exact)
    again = truth.shape_of(population().shape, mean, truth.logvar)
    vector, found = (truth.weight @ state_of(body) for body in (bodies[0], again.mean))
    assert np.corrcoef(vector, found)[0, 1] > 0.9
    assert (logvar <= 0).all()
    moved = truth.moved(mean, exact, other)
    assert moved == pytest.approx(truth.vector_of(other)[0])


@pytest.mark.slow
def test_the_readout_follows_the_shape():
    """Along a vector that a shape makes, the measurement that was moved changes most, and as it was moved."""
    truth, *_ = made_people(5)
    prior = population().shape
    readout = truth.readout(prior, ("inseam", "arm", "waist"))
    assert readout.shape == (3, D)
    spread = truth.weight @ prior.covariance @ truth.weight.T + truth.noise
    spread += np.exp(np.mean(truth.logvar - truth.one_view)) * truth.photo_noise
    assert np.sqrt(np.diag(readout @ spread @ readout.T)) == pytest.approx(np.ones(3))
    bodies = draw(prior, 60, 3)
    states = np.stack([state_of(body) for body in bodies])
    sizes = measure_body(bodies)[:, names_of(("inseam", "arm", "waist"))]
    read, ratios = states @ truth.weight.T @ readout.T, sizes / bodies[:, :1]
    shared = np.corrcoef(read.T, ratios.T)[:3, 3:]
    assert (shared.diagonal() > 0.4).all() and (shared.argmax(0) == range(3)).all()


def test_a_measurement_that_is_set_is_exact():
    woman = of_sex(population().shape, "woman")
    waist, hip = names_of(("waist", "hip"))
    before = measured(woman)
    target = float(before.values[waist]) - 0.03
    moved, fixed = (measured(edit(woman, {"waist": target}, exact=names)) for names in ((), ("waist",)))
    assert moved.sd == pytest.approx(before.sd, rel=0.1)
    assert fixed.sd[waist] < 0.003 and fixed.sd[hip] < 0.9 * moved.sd[hip]


def test_body_vector_files(tmp_path):
    truth, *_ = made_people(5)
    record = run_record(KIND, family="tiny", config={"people": 5}, inputs={"body_encoder": "abc"})
    file = tmp_path / "body-shape.safetensors"
    save_body_vectors(file, replace(truth, record=record))
    loaded = load_body_vectors(file, "abc")
    assert loaded.photo_noise == pytest.approx(truth.photo_noise) and loaded.weight == pytest.approx(truth.weight, 1e-5)
    assert "for another body encoder" in refused(load_body_vectors, file, "other")


def test_bodies_stay_within_bounds():
    far = np.full(P, 9.0)
    low, high = bounds()
    assert (within_bounds(far) == high).all() and (within_bounds(-far) == low).all()
