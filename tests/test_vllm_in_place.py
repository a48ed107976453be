"""vLLM's weights written to where they lie; in a process of its own, since vLLM makes one engine in each that has
numba. `make test-vllm`."""

import pytest
import torch

import finepoint
from finepoint.errors import FinepointError
from finepoint.exchange import vllm_engine
from test_vllm import asked, assert_alike, engine_on, greedy, made, untrained

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
made = made  # the fixture


@pytest.fixture(scope="module")
def in_place(made):
    return made, engine_on(made, in_place=True)


def test_an_adapter_is_exchanged_in_place_also_one_of_a_tied_weight(in_place):
    folder, engine = in_place
    assert_alike(engine, folder, "a")
    before = {name: value.clone() for name, value in vllm_engine.model_of(engine).state_dict().items()}
    for name in (None, "a", "tied", "b", "a"):
        vllm_engine.switch(engine, name and str(folder / name))
        assert_alike(engine, folder, name)
    with pytest.raises(FinepointError, match="not those of the base"):
        vllm_engine.switch(engine, str(folder / "other"))
    assert_alike(engine, folder, "a")
    after = vllm_engine.model_of(engine).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_running_engine_follows_a_training(in_place):
    folder, engine = in_place
    vllm_engine.switch(engine, None)
    model = untrained()
    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1, seed=5), audit=False)
    with finepoint.sync.Sender(tuner, "127.0.0.1:0") as sender:
        receiver = finepoint.sync.Receiver(vllm_engine.model_of(engine), sender.address)
        for step in range(3):
            with torch.no_grad():
                for delta in tuner.parameters():
                    delta.add_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(step)) * 0.2)
            receiver.wait(sender.send())
            engine.reset_prefix_cache()
            ids, likelihoods = asked(engine)
            wanted, known = greedy(model)
            assert ids == wanted
            assert likelihoods == pytest.approx(known, abs=1e-4)
        receiver.rollback()
        receiver.close()
    engine.reset_prefix_cache()
    assert_alike(engine, folder, None)
