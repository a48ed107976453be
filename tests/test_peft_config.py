"""Every field of PEFT's configurations: computed as PEFT computes it, or refused by its name. PEFT is the reference."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from conftest import tiny_llama
from finepoint import FinepointError, SparseAdapter
from finepoint.adapters.lowrank import load_merged
from finepoint.adapters.peft_config import SPARSE as SPARSE_TYPES
from finepoint.exchange.formats import export, import_adapter

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 21)[None]
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=4,
                                      initializer_range=0.2, bos_token_id=1, eos_token_id=2)).eval()  # fmt: skip


def tiny_mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2,
                                        time_step_rank=4, initializer_range=0.2)).eval()  # fmt: skip


MODELS = {
    "llama": lambda: tiny_llama(tied=False),
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "mamba": tiny_mamba,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    places = {}
    for name, make in MODELS.items():
        places[name] = str(tmp_path_factory.mktemp(name))
        make().save_pretrained(places[name])
    return places


def loaded(place):
    return AutoModelForCausalLM.from_pretrained(place).eval()


def trained(base, folder, make, **saving):
    """A folder as PEFT saves it, of numbers that are not where they began; PEFT reads it back as it was."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(loaded(base), make())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder, **saving)
    return folder


def edited(folder, **fields):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def peft_logits(base, folder):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(loaded(base), folder).eval()(IDS).logits


def ours(base, folder, tmp_path):
    """Logits by both ways that read such a folder: laid over a model, and exported."""
    model = loaded(base)
    with torch.no_grad(), load_merged(folder, model).applied(model):
        applied = model(IDS).logits
    export(base, str(folder), "merged", str(tmp_path / "merged"))
    with torch.no_grad():
        return applied, loaded(tmp_path / "merged")(IDS).logits


def assert_equal_or_refused(base, folder, tmp_path, field=None):
    """With `field`: refused, naming it, by every reader. Without: PEFT's logits, by every reader."""
    if field is None:
        expected = peft_logits(base, folder)
        with torch.no_grad():
            assert not torch.allclose(loaded(base)(IDS).logits, expected, atol=1e-2)  # it does change something
        for logits in ours(base, folder, tmp_path):
            assert torch.allclose(logits, expected, atol=1e-4)
        return
    with pytest.raises(FinepointError, match=field) as refusal:
        load_merged(folder, loaded(base))
    assert "\n" not in str(refusal.value)
    with pytest.raises(FinepointError, match=field):
        export(base, str(folder), "merged", str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


# Options that PEFT builds here, and whether they are computed (None) or refused, by what name.
BUILT = {
    "r": ("llama", {"r": 2}, None),
    "target_modules": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"}, None),
    "exclude_modules": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}, None),
    "lora_alpha": ("llama", {"lora_alpha": 13}, None),
    "lora_dropout": ("llama", {"lora_dropout": 0.3}, None),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, None),
    "fan_in_fan_out of a linear layer": ("llama", {"fan_in_fan_out": True}, None),
    "fan_in_fan_out left out": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": False}, None),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, None),
    "bias of adapted layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}, None),
    "use_rslora": ("llama", {"use_rslora": True}, None),
    "use_rslora with patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2},
                                           "alpha_pattern": {r"layers\.1.*": 5}}, None),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}, None),
    "modules_to_save, an embedding": ("llama", {"modules_to_save": ["embed_tokens"]}, None),
    "modules_to_save, tied head": ("tied", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "modules_to_save, tied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "modules_to_save, both": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
    "target_modules, head": ("llama", {"target_modules": ["lm_head"]}, None),
    "target_modules, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "target_modules, tied head": ("tied", {"target_modules": ["lm_head"]}, "target_modules"),
    "target_modules, tied embedding": ("tied", {"target_modules": ["embed_tokens"]}, "target_modules"),
    "target_modules, called layers": ("mamba", {"target_modules": ["x_proj", "in_proj"]}, None),
    # Its weight is multiplied with by itself, where PEFT's factors have no part.
    "target_modules, not called": ("mamba", {"target_modules": ["x_proj", "dt_proj"]}, "target_modules .*mixer.dt_"),
    "init_lora_weights": ("llama", {"init_lora_weights": "gaussian"}, None),
    "init_lora_weights, none": ("llama", {"init_lora_weights": False}, None),
    "init_lora_weights, orthogonal": ("llama", {"init_lora_weights": "orthogonal"}, None),
    "init_lora_weights, PiSSA": ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights"),
    "init_lora_weights, fast PiSSA": ("llama", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "init_lora_weights, OLoRA": ("llama", {"init_lora_weights": "olora"}, "init_lora_weights"),
    "init_lora_weights, MiCA": ("llama", {"init_lora_weights": "mica"}, "init_lora_weights"),
    "layers_to_transform": ("llama", {"layers_to_transform": [1]}, None),
    "layers_pattern": ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}, None),
    "rank_pattern": ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 3}}, None),
    "alpha_pattern": ("llama", {"alpha_pattern": {"q_proj": 3, "up_proj": 20}}, None),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
    "use_dora": ("llama", {"use_dora": True}, None),
    "use_dora of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, None),
    "use_dora of an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora"),
    "alora_invocation_tokens": ("llama", {"alora_invocation_tokens": [40, 41]}, "alora_invocation_tokens"),
    "layer_replication": ("llama", {"layer_replication": [(0, 1), (0, 1)]}, "layer_replication"),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, "lora_bias"),
    "target_parameters": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "ensure_weight_tying": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "inference_mode": ("llama", {"inference_mode": False}, None),
}  # fmt: skip
# Fields that say where an adapter comes from, or that have a meaning only while another field is on: any value.
HARMLESS = {
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"}, "peft_version": "0.99.0", "revision": "main",
    "base_model_name_or_path": "somewhere/else", "megatron_core": "megatron.other", "qalora_group_size": 8,
    "task_type": "FEATURE_EXTRACTION", "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0},
    "corda_config": {"verbose": True}, "lora_ga_config": {"stable_gamma": 1},
    "runtime_config": {"ephemeral_gpu_offload": True},
}  # fmt: skip


@pytest.mark.parametrize("option", BUILT)
def test_an_option_of_lora_is_computed_as_peft_does_or_refused_by_name(option, bases, tmp_path):
    base, options, refused = BUILT[option]
    folder = trained(bases[base], tmp_path / "lora", lambda: peft.LoraConfig(**LORA | options))
    assert_equal_or_refused(bases[base], folder, tmp_path, refused)


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return trained(bases["llama"], tmp_path_factory.mktemp("plain") / "lora", lambda: peft.LoraConfig(**LORA))


def plain_with(plain, tmp_path, **fields):
    (tmp_path / "lora").mkdir()
    for file in Path(plain).iterdir():
        (tmp_path / "lora" / file.name).write_bytes(file.read_bytes())
    return edited(tmp_path / "lora", **fields)


def test_fields_without_effect_may_say_what_they_like(plain, bases, tmp_path):
    assert_equal_or_refused(bases["llama"], plain_with(plain, tmp_path, **HARMLESS), tmp_path)


FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


OTHERS = [*(field for field in FIELDS if field not in {*BUILT, *HARMLESS}), "of_a_later_version"]


def test_all_other_fields_are_refused_by_name_unless_off(plain, bases, tmp_path):
    folder = plain_with(plain, tmp_path)
    before = (folder / "adapter_config.json").read_text()
    for field in OTHERS:
        for value in (None, False, [], {}) if field != "peft_type" else ():
            assert load_merged(edited(folder, **{field: value}), loaded(bases["llama"])).count
        assert_equal_or_refused(bases["llama"], edited(folder, **{field: {"some": "thing"}}), tmp_path, field)
        (folder / "adapter_config.json").write_text(before)


KINDS = [*sorted({str(kind.value) for kind in peft.PeftType} - {"LORA"}), "LATER"]


def test_another_type_of_adapter_is_refused_by_name_everywhere(plain, bases, tmp_path):
    folder = plain_with(plain, tmp_path)
    for kind in KINDS:
        assert_equal_or_refused(bases["llama"], edited(folder, peft_type=kind), tmp_path, f"peft_type is '{kind}'")
        if kind.lower() not in SPARSE_TYPES:
            with pytest.raises(FinepointError, match=f"{kind}"):
                import_adapter(str(folder), bases["llama"])


def test_a_resized_embedding_saved_along_is_read_where_peft_writes_into_the_shared_weight(bases, tmp_path):
    for base in ("llama", "tied"):
        folder = trained(bases[base], tmp_path / base, lambda: peft.LoraConfig(**LORA), save_embedding_layers=True)
        (tmp_path / f"{base}-out").mkdir()
        assert_equal_or_refused(bases[base], folder, tmp_path / f"{base}-out")


WRONG = {
    "rank": ({"r": 3}, "have rank 4"),
    "rank by pattern": ({"rank_pattern": {"q_proj": 5}}, "q_proj have rank 4"),
    "no pattern": ({"rank_pattern": {"(": 5}}, "rank_pattern"),
    "a list of patterns": ({"alpha_pattern": [3]}, "alpha_pattern"),
    "other targets": ({"target_modules": ["q_proj"]}, "leave out .*up_proj"),
    "no targets": ({"target_modules": None}, "target_modules is None"),
    "excluded": ({"exclude_modules": ["up_proj"]}, "exclude_modules leaves out .*up_proj"),
    "other layers": ({"layers_to_transform": [0]}, "leave out model.layers.1"),
    "magnitudes": ({"use_dora": True}, "magnitudes of .* are missing"),
    "a head that is not there": ({"modules_to_save": ["lm_head"]}, "the file lacks lm_head.weight"),
    "a bias of a later kind": ({"bias": "some"}, "bias is 'some'"),
    "a number for a truth": ({"use_rslora": 1}, "use_rslora is 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_does_not_describe_the_file_is_refused(case, plain, bases, tmp_path):
    fields, message = WRONG[case]
    assert_equal_or_refused(bases["llama"], plain_with(plain, tmp_path, **fields), tmp_path, message)


SPARSE = {
    "SHIRA": lambda **o: peft.ShiraConfig(**{"r": 1, "random_seed": 1, "target_modules": ["q_proj"]} | o),
    "SUPERTUNING": lambda **o: peft.SupertuningConfig(**{"sparsity": 0.9, "target_modules": ["q_proj"]} | o),
}
SPARSE_BUILT = {
    ("SHIRA", "r"): ({"r": 2}, None),
    ("SHIRA", "random_seed"): ({"random_seed": 5}, None),
    ("SHIRA", "init_weights"): ({"init_weights": False}, None),
    ("SHIRA", "fan_in_fan_out"): ({"fan_in_fan_out": True}, None),
    ("SHIRA", "target_modules"): ({"target_modules": ".*0.*down_proj"}, None),
    ("SHIRA", "modules_to_save"): ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("SUPERTUNING", "sparsity"): ({"sparsity": 0.8}, None),
    ("SUPERTUNING", "select_top"): ({"select_top": False}, None),
    ("SUPERTUNING", "init_weights"): ({"init_weights": False}, None),
    ("SUPERTUNING", "target_modules"): ({"target_modules": ["o_proj", "up_proj"]}, None),
    ("SUPERTUNING", "modules_to_save"): ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("SUPERTUNING", "r"): ({"r": 2, "lora_alpha": 4.0}, "r is 2"),
    ("SUPERTUNING", "save_precomputed_indices"): ({"save_precomputed_indices": False}, "indices"),
}


@pytest.mark.parametrize(("kind", "option"), SPARSE_BUILT)
def test_an_option_of_peft_s_sparse_types_is_computed_as_peft_does_or_refused_by_name(kind, option, bases, tmp_path):
    options, refused = SPARSE_BUILT[kind, option]
    folder = trained(bases["llama"], tmp_path / "a", lambda: SPARSE[kind](**options))
    if refused:
        with pytest.raises(FinepointError, match=refused):
            import_adapter(str(folder), bases["llama"])
        return
    model = loaded(bases["llama"])
    expected = peft_logits(bases["llama"], folder)
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
        with import_adapter(str(folder), bases["llama"]).applied(model):
            assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("kind", SPARSE)
def test_other_fields_of_peft_s_sparse_types_are_refused_by_name(kind, bases, tmp_path):
    folder = trained(bases["llama"], tmp_path / "a", SPARSE[kind])
    known = {option for built, option in SPARSE_BUILT if built == kind} | {*HARMLESS, "inference_mode", "peft_type"}
    known |= {"mask_type", "lora_alpha", "lora_dropout"}  # of what is drawn, and of a low-rank part
    fields = {field.name for field in dataclasses.fields(SPARSE[kind]())} - known
    before = json.loads((folder / "adapter_config.json").read_text())
    for field in {*fields, "of_a_later_version", "layers_to_transform"}:
        edited(folder, **{field: [3]})
        with pytest.raises(FinepointError, match=f"{field} is"):
            import_adapter(str(folder), bases["llama"])
        (folder / "adapter_config.json").write_text(json.dumps(before))
    edited(folder, target_modules=["up_proj"])
    with pytest.raises(FinepointError, match="target_modules"):
        import_adapter(str(folder), bases["llama"])


def test_what_reads_finepoint_s_adapters_says_who_takes_peft_s(plain):
    with pytest.raises(FinepointError, match=r"no finepoint.safetensors; PEFT's adapters are taken by eval"):
        SparseAdapter.load(plain)
