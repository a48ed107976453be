"""The kernel is chosen by measuring: right whatever is chosen, once, kept, and the same when a run is resumed."""

import json
from collections import Counter

import pytest
import torch

from finepoint.errors import FinepointError
from finepoint.tuner import kernels
from finepoint.tuner.kernels import choice, plain
from finepoint.tuner.kernels.choice import Case, case_of, way


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Times are made up: what each way takes, by name; counts how often each was timed. A cache of its own."""
    times, asked, begun = {}, Counter(), {"KNOWN": {}, "_TAKEN": {}, "_RECORDED": {}}
    for name, empty in begun.items():
        monkeypatch.setattr(choice, name, empty)
    monkeypatch.setattr(kernels, "KNOWN", choice.KNOWN)
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path))
    monkeypatch.setenv("FINEPOINT_KERNELS", "measure")
    choice._place.cache_clear()
    names = {id(one): name for name, one in (*kernels.KERNELS["cpu"].items(), *plain.PRODUCTS.items())}

    def taken(one, operands, best):
        name = names[id(one)]
        asked[name] += 1
        return times.get(name, 50.0)

    monkeypatch.setattr(choice, "_milliseconds", taken)
    yield times, asked
    choice._place.cache_clear()


def begin_anew():
    """As another process would."""
    choice.forget_()


def layer(dtype=torch.float32, out=20, features=30, tokens=9):
    return torch.randn(tokens, out).to(dtype), torch.randn(tokens, features).to(dtype)


def name_of(dy, x, count):
    found = kernels.kernel_for(dy, x, count)
    return next(name for name, one in kernels.KERNELS["cpu"].items() if one is found)


@pytest.mark.parametrize("fastest", ["tiles", "gather", "dense", "turned"])
def test_the_fastest_is_taken_and_asked_once_also_by_later_processes(fastest, measuring):
    times, asked = measuring
    times[fastest] = 1.0
    dy, x = layer()
    assert name_of(dy, x, 4) == fastest
    before = asked.copy()
    times[fastest] = 100.0
    assert name_of(dy, x, 4) == fastest
    assert name_of(dy, x, 5) == fastest  # about as many
    begin_anew()
    assert name_of(dy, x, 4) == fastest
    assert asked == before
    assert name_of(dy, layer(features=31)[1], 4) != fastest  # another shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_only_bfloat16_is_rounded_and_only_where_that_is_clearly_faster(dtype, measuring):
    times, _ = measuring
    times |= {"half": 0.9, "half turned": 0.9, "dense": 1.0}
    assert name_of(*layer(dtype), 4) == "dense"
    if dtype == torch.float32:
        assert name_of(*layer(torch.bfloat16), 4) == "dense"
        times["half"] = 0.5
        assert name_of(*layer(torch.bfloat16, out=21), 4) == "half"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"choices": 3}', '{"choices": []}', '{"choices": {"%s": 4}}',
     '{"choices": {"%s": {"taken": "half"}}}', '{"choices": {"%s": {"taken": []}}}',
     '{"choices": {"%s": {"taken": "dense", "ways": 3}}}', '{"choices": {"\\ud800": {"taken": "dense"}}}'],
)  # fmt: skip
def test_a_file_that_is_broken_or_wrong_is_measured_again(content, measuring):
    times, asked = measuring
    times["turned"] = 1.0
    dy, x = layer()
    place, _ = choice.kept("cpu")
    place.write_text(content.replace("%s", case_of(dy, x, 4).label))
    assert name_of(dy, x, 4) == "turned"
    assert asked["turned"]
    assert json.loads(place.read_text())["choices"][case_of(dy, x, 4).label]["taken"] == "turned"


def test_a_kernel_that_could_not_be_had_when_the_others_were_measured_is_measured_with_them(measuring):
    times, asked = measuring
    times |= {"tiles": 1.0, "turned": 2.0}
    dy, x = layer()
    place, label = choice.kept("cpu")[0], case_of(dy, x, 4).label
    place.write_text(json.dumps({"choices": {label: {"taken": "turned", "ways": ["gather", "dense", "turned"]}}}))
    assert name_of(dy, x, 4) == "tiles"
    begin_anew()
    asked.clear()
    assert name_of(dy, x, 4) == "tiles"
    assert not asked


@pytest.mark.parametrize("taken", ["tiles", "gather", "dense", "turned"])
def test_whatever_the_file_says_costs_time_alone(taken, measuring):
    dy, x = layer()
    indices = torch.arange(0, 600, 7)
    place, _ = choice.kept("cpu")
    known = {"taken": taken, "ways": [*kernels.KERNELS["cpu"]]}
    place.write_text(json.dumps({"choices": {case_of(dy, x, len(indices)).label: known}}))
    assert name_of(dy, x, len(indices)) == taken
    torch.testing.assert_close(kernels.sampled_gradient(dy, x, indices), plain.reference(dy, x, indices))


def test_a_folder_that_cannot_be_written_costs_a_measurement_each_time(measuring, monkeypatch, tmp_path):
    times, asked = measuring
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    choice._place.cache_clear()
    times["gather"] = 1.0
    for turn in (1, 2):
        assert name_of(*layer(), 4) == "gather"
        assert asked["gather"] == turn
        begin_anew()


def test_a_resumed_run_takes_what_it_took_whatever_is_faster_now(measuring):
    times, _ = measuring
    times["dense"] = 1.0
    dy, x = layer()
    assert name_of(dy, x, 4) == "dense"
    recorded = choice.told()
    assert recorded == {case_of(dy, x, 4).label: "dense"}
    choice.kept("cpu")[0].unlink()
    begin_anew()
    times |= {"dense": 9.0, "gather": 1.0}
    assert name_of(dy, x, 4) == "gather"
    choice.take_(recorded)
    assert name_of(dy, x, 4) == "dense"


def test_a_recorded_kernel_that_is_not_to_be_had_is_told(measuring, caplog):
    times, _ = measuring
    times["gather"] = 1.0
    dy, x = layer()
    choice.take_({case_of(dy, x, 4).label: "of another machine"})
    assert name_of(dy, x, 4) == "gather"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_nothing_is_measured_where_the_environment_says_so(measuring, monkeypatch):
    times, asked = measuring
    times["gather"] = 1.0
    monkeypatch.setenv("FINEPOINT_KERNELS", "fixed")
    assert name_of(*layer(out=40, features=40), 4) == "tiles"
    assert not asked
    assert choice.told() == {}
    monkeypatch.setenv("FINEPOINT_KERNELS", "fast")
    with pytest.raises(FinepointError, match="'fast' in the environment; it is measure or fixed"):
        name_of(*layer(out=41), 4)


def test_columns_rows_and_blocks_are_measured_as_the_products_they_are(measuring):
    times, asked = measuring
    times["turned"] = 1.0
    dy, x = layer(out=20, features=3)
    torch.testing.assert_close(choice.multiplied(dy, x), dy.T @ x)
    dy, x = torch.randn(9, 4, 16), torch.randn(9, 4, 32)
    torch.testing.assert_close(choice.multiplied(dy, x), torch.einsum("tbi,tbj->bij", dy, x))
    assert set(asked) == {"dense", "turned"}
    assert set(choice.told()) == {"cpu, float32, 20 x 3, all entries", "cpu, float32, 16 x 32 x 4 blocks, all entries"}


def test_what_is_measured_is_small_and_of_the_shape(monkeypatch):
    """With the real clock: every way runs on numbers made up for it, of large and of small weights."""
    monkeypatch.setattr(choice, "_keep", lambda case, found: None)
    for height, width, count in ((8, 12, 3), (49152, 576, 28_000), (5, 1 << 21, 100)):
        case = case_of(torch.empty(1, height), torch.empty(1, width), count)
        dy, x, indices = choice._operands(case)
        assert dy.shape[0] == x.shape[0] in range(64, 513)
        assert case.height * case.width <= choice.AREA
        assert len(indices) in range(count * case.height // height // 2, 2 * count + 1)
        assert (indices.diff() > 0).all()
        assert 0 <= indices[0] <= indices[-1] < case.height * case.width
    case = Case("cpu", torch.bfloat16, torch.bfloat16, 16, 16, 8)
    taken, found = choice.measured(case, kernels.kernels_for(case))
    assert taken in found
    assert all(milliseconds > 0 for milliseconds in found.values())
    nowhere = Case("meta", torch.float32, torch.float32, 4, 4, 1)
    assert way(nowhere, {"shape": plain.by_shape}, "shape") is plain.by_shape
