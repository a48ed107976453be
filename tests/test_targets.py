import pytest
import torch
from torch import nn

from conftest import make_tokenizer, tiny_gemma, tiny_llama, write_lines
from families import FAMILIES
from finepoint import SparseAdapter
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.models.loading import block_of
from finepoint.selection.targets import target_weights


def test_linear_is_every_linear_layer_of_the_blocks_and_nothing_else(model):
    names = set(target_weights(model))
    expected = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if type(module) is nn.Linear and ".layers." in module_name
    }
    assert names == expected
    assert len(names) == 14


def test_attention_and_mlp_split_linear(model):
    attention, mlp = set(target_weights(model, "attention")), set(target_weights(model, "mlp"))
    assert not attention & mlp
    assert attention | mlp == set(target_weights(model, "linear"))
    assert len(attention) == 8


def test_all_names_a_tied_weight_once():
    tied, untied = tiny_llama(tied=True), tiny_llama(tied=False)
    assert "lm_head.weight" not in target_weights(tied, "all")
    assert "lm_head.weight" in target_weights(untied, "all")
    assert len({id(w) for w in target_weights(tied, "all").values()}) == len(target_weights(tied, "all"))


@pytest.mark.parametrize("targets", ["v,o", "v_proj,o_proj", ["*.v_proj", "*.o_proj"], ["*.v_proj.weight", "o"]])
def test_short_names_and_globs_agree(llama, targets):
    expected = [f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "vo"]
    assert list(target_weights(llama, targets)) == expected


def test_a_short_name_does_not_pick_up_biases():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"v_proj": nn.Linear(2, 2)})])

    model = Attention()
    assert list(target_weights(model, "v")) == ["layers.0.v_proj.weight"]
    assert list(target_weights(model, "*.bias")) == ["layers.0.v_proj.bias"]


def test_expert_weights_in_blocks_are_linear():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            self.layers[0].experts = nn.Module()
            self.layers[0].experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 3))
            self.layers[0].conv = nn.Conv1d(2, 2, 3)

    assert list(target_weights(Experts())) == ["layers.0.experts.gate_up_proj"]


def test_block_of():
    model = tiny_gemma()
    assert block_of(model, "model.layers.1.mlp.up_proj.weight") == "model.layers.1"
    assert block_of(model, "model.embed_tokens.weight") is None


def test_no_match_offers_close_names(llama):
    with pytest.raises(FinepointError, match=r"no weight matches 'vproj'; close names: .*v_proj"):
        target_weights(llama, "vproj")
    with pytest.raises(FinepointError, match="presets are linear"):
        target_weights(llama, "zzzzzzzz*")
    with pytest.raises(FinepointError, match="targets is empty"):
        target_weights(llama, " , ")


def test_quantised_weights_are_refused(llama):
    layer = llama.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(FinepointError, match="int8, not floating point"):
        target_weights(llama, "model.layers.0.mlp.up_proj")


@pytest.mark.filterwarnings("ignore")  # of models, about kernels that are not installed
def test_linear_takes_dbrx_s_experts_and_no_mixing_vectors():
    from families import FAMILIES

    dbrx = set(target_weights(FAMILIES["dbrx"].build()))
    assert {f"transformer.blocks.{i}.ffn.experts.mlp.{w}" for i in range(2) for w in ("w1", "v1", "w2")} <= dbrx
    rwkv = target_weights(FAMILIES["rwkv"].build())
    assert rwkv
    assert all(weight.ndim == 2 for weight in rwkv.values())
    experts = target_weights(FAMILIES["gpt_oss"].build())  # whose experts have biases of two dimensions
    assert any("experts.down_proj" in name for name in experts)
    assert not any(name.endswith("bias") for name in experts)


def test_a_parameter_is_named_in_full_and_a_preset_that_finds_nothing_says_so():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(())), nn.Linear(2, 2)

    assert list(target_weights(Bare(), "scale")) == ["scale"]
    with pytest.raises(FinepointError, match=r"no weight that 'linear' stands for .*names look like 'layer.weight'"):
        target_weights(Bare())
    with pytest.raises(FinepointError, match="none: the model has no weights"):
        target_weights(nn.Identity(), "linear")


# git and idefics have no part that only writes; blip-2 reads no text without a picture.
SEEING = [name for name, family in FAMILIES.items()
          if family.kind == "vision and language" and name not in ("git", "idefics", "blip-2")]  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("llava", "qwen2_5_vl") else pytest.mark.slow)
                                  for n in SEEING])  # fmt: skip
def test_of_models_that_see_the_part_that_writes_is_the_default(name, tmp_path):
    model = FAMILIES[name].build().train(False).float()
    default, everywhere = target_weights(model), target_weights(model, "linear-everywhere")
    assert default.keys() < everywhere.keys()
    ids = torch.arange(8, 16)[None]  # text alone
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
    loss.backward()
    reached = {key for key, weight in everywhere.items() if weight.grad is not None and weight.grad.any()}
    crossing = {key for key in default if "cross_attn" in key or ".layers.1." in key}  # mllama's look at pictures
    assert reached <= default.keys()
    assert default.keys() - reached <= (crossing if name == "mllama" else set())


def test_of_models_without_another_part_linear_is_everywhere(llama):
    for model in (llama, FAMILIES["t5"].build(), FAMILIES["clip"].build(), FAMILIES["bert"].build()):
        assert target_weights(model).keys() == target_weights(model, "linear-everywhere").keys()


def test_a_model_that_sees_is_trained_on_text_from_the_command_line(tmp_path):
    FAMILIES["qwen2_5_vl"].build().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"prompt": f"Q: {a} + 2 ?\nA:", "completion": f" {a + 2}"} for a in range(4)]
    data = str(write_lines(tmp_path / "rows.jsonl", rows))
    model, adapter = str(tmp_path / "m"), str(tmp_path / "a")
    train = ["train", "--model", model, "--data", data, "--steps", "2", "--density", "0.05", "--lr", "0.01"]
    assert main([*train, "--output", adapter]) == 0
    assert {name.split(".layers.")[0] for name in SparseAdapter.load(adapter)} == {"model.language_model"}
    assert main(["verify", adapter, "--model", model]) == 0
    assert main(["eval", "--model", model, "--adapter", adapter, "--id", f"sums={data}", "--new-tokens", "2"]) == 0
