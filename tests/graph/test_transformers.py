"""Models of transformers attend in C between their INT8 projections, and only they."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.graph import transformers as known
from octavo.kernels.attention import native
from octavo.kernels.dispatch.operator import forget_plans

transformers = pytest.importorskip("transformers")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

NO_C = native.LIBRARY.reason()
in_c = pytest.mark.skipif(bool(NO_C), reason=NO_C)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
}


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.BertModel(transformers.BertConfig(**{**SIZES, **options}))
    return model.eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    model: nn.Module = transformers.LlamaModel(config)
    return model.eval()


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    return octavo.quantize(model, octavo.Int8Dynamic(), verbose=False, **options)


@pytest.fixture
def calls(count_calls: Callable[[Any, str], list[int]]) -> list[int]:
    """Grows with every call of the C, where there is any."""
    return [] if NO_C else count_calls(native.LIBRARY, "octavo_attention")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    mask = torch.arange(12).expand(3, 12) < torch.tensor([[12], [9], [4]])
    return {"input_ids": torch.arange(36).reshape(3, 12), "attention_mask": mask.long()}


def last(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(**batch, **options).last_hidden_state
    return hidden[batch["attention_mask"].bool()]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # a last bit of attention may lead to the next code of a later layer
    assert float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)) < 0.01


@in_c
@pytest.mark.parametrize("make", [bert, llama])
def test_quantized_models_use_it(
    make: Any, calls: list[int], batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, padding = quantized(make()), batch["attention_mask"]
    for mask in (padding, torch.ones_like(padding)):
        batch["attention_mask"] = mask
        calls.clear()
        found = last(model, batch)
        assert len(calls) == 2
        with monkeypatch.context() as without:
            without.setattr(native.LIBRARY, "reason", lambda: "a test")
            forget_plans()
            close(found, last(model, batch))
        forget_plans()
        assert len(calls) == 2


@in_c
def test_float_models_and_copies(
    calls: list[int], batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bert()
    int8 = quantized(model)
    last(model, batch)
    assert not calls, "a float model in the same process keeps what it had"
    found = last(int8, batch)
    kept = pickle.dumps(int8)
    # as in another process, where nobody has registered our function yet
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.delitem(type(functions)._global_mapping, known.NAME)
    for other in (copy.deepcopy(int8), pickle.loads(kept)):  # noqa: S301
        calls.clear()
        assert torch.equal(last(other, batch), found)
        assert len(calls) == 2
        assert other.config._attn_implementation == known.NAME
        assert known.NAME in ALL_ATTENTION_FUNCTIONS


def _configurations(model: nn.Module) -> set[int]:
    """Of a model and its modules, by identity."""
    held = [vars(module).get("config") for module in model.modules()]
    found = [one for one in held if isinstance(one, transformers.BertConfig)]
    assert len(found) > 2
    return {id(one) for one in found}


def test_a_configuration_is_changed_in_a_copy() -> None:
    model = bert()
    config, sibling = model.config, transformers.BertModel(model.config)
    before = config.to_dict()
    made, inplace = quantized(model), quantized(model, inplace=True)
    assert inplace is model
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"
    assert _configurations(sibling) == {id(config)}
    for one in (made, inplace):
        assert _configurations(one) == {id(one.config)} != {id(config)}
        assert one.config._attn_implementation == known.NAME
        assert one.config.to_dict() == before


def test_transformers_own_function_stays_as_it_is(batch: dict[str, torch.Tensor]) -> None:
    masks = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    int8 = quantized(bert())
    last(int8, batch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS[known.NAME] is known.attend_in_c
    assert ALL_MASK_ATTENTION_FUNCTIONS[known.NAME] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    del int8
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is masks


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_models_that_are_not_known_keep_their_function(
    implementation: str,
    calls: list[int],
    batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if implementation == "sdpa":
        monkeypatch.setattr(known, "MODELS", frozenset({"another"}))
    model = bert(attn_implementation=implementation)
    int8 = quantized(model)
    assert int8.config._attn_implementation == implementation
    assert not any(known.MARK in vars(module) for module in int8.modules())
    found = last(int8, batch)
    assert not calls
    close(found, last(quantized(bert()), batch))


def test_another_function_can_be_chosen_afterwards(
    calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    int8 = quantized(bert())
    found = last(int8, batch)
    calls.clear()
    for implementation in ("eager", "sdpa"):
        int8.set_attn_implementation(implementation)
        close(last(int8, batch), found)
    assert not calls


class OnPurposeError(Exception):
    """What the tests below raise."""


def _fail(*_: object, **__: object) -> None:
    raise OnPurposeError


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is made of, by identity where that can be seen from outside."""

    def inside(value: Any) -> Any:
        return [(key, id(part)) for key, part in value.items()] if isinstance(value, dict) else ()

    modules = dict(model.named_modules())
    return {
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {
            (name, key): (id(value), inside(value))
            for name, module in modules.items()
            for key, value in vars(module).items()
        },
        "weights": {name: one.detach().clone() for name, one in model.state_dict().items()},
        "config": (model.config.to_dict(), model.config._attn_implementation),
    }


def _process() -> dict[str, Any]:
    """What a process has only one of."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return {
        "attention": ALL_ATTENTION_FUNCTIONS["sdpa"],
        "masks": ALL_MASK_ATTENTION_FUNCTIONS["sdpa"],
        "levels": {one.name: (one.level, one.disabled, list(one.handlers)) for one in loggers},
        "verbosity": transformers.logging.get_verbosity(),
        "warnings": list(warnings.filters),
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        ),
        "random": torch.get_rng_state().tolist(),
        "hooks": [
            list(getattr(nn.modules.module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
        ],
    }


def _same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "weights":
            assert value.keys() == after[name].keys()
            assert all(torch.equal(one, after[name][key]) for key, one in value.items())
        else:
            assert value == after[name], name


FAILURES = [
    "octavo.compression.quantization.swap.layer_type",  # nothing has changed yet
    "octavo.compression.quantization.swap.share_weights",  # layers are made, and not in place
    "octavo.graph.install.drop_activation",  # layers are in place, with activations of their own
    "octavo.graph.install.keep_off_fused_kernels",
    "octavo.graph.install.adapt",
    "octavo.graph.transformers._share",  # attention and norms are in place
    "octavo.graph.transformers.add_norm",  # as are those of the first modules
    "octavo.graph.install.prepare",  # all is in place, and the C of it is being compiled
]


@pytest.mark.parametrize("place", FAILURES)
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copied"])
def test_an_error_on_the_way_leaves_everything_as_it_was(
    place: str, inplace: bool, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    known.attention_name()  # what is registered once stays, and concerns nobody else
    model = bert()
    wanted, before, process = last(model, batch), _state(model), _process()
    with monkeypatch.context() as broken:
        broken.setattr(place, _fail)
        with pytest.raises(OnPurposeError):
            quantized(model, inplace=inplace)
    _same(before, _state(model))
    _same(process, _process())
    assert torch.equal(last(model, batch), wanted)
    int8 = quantized(model, inplace=inplace)
    assert int8.config._attn_implementation == known.NAME, "and it can be quantized now"


def test_an_error_behind_some_modules_leaves_everything_as_it_was(
    batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    known.attention_name()
    model = bert()
    wanted, before, process = last(model, batch), _state(model), _process()
    shared, times = known._share, iter(range(10**6))

    def fail_late(*given: Any) -> None:
        shared(*given)
        if next(times) == 12:
            assert any(hasattr(one, known.MARK) for one in model.modules())
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(known, "_share", fail_late)
        with pytest.raises(KeyboardInterrupt):
            quantized(model, inplace=True)
    _same(before, _state(model))
    _same(process, _process())
    assert torch.equal(last(model, batch), wanted)


def test_quantizing_changes_nothing_in_the_process() -> None:
    known.attention_name()
    model = bert()
    before, process = _state(model), _process()
    int8 = quantized(model)
    _same(before, _state(model))
    _same(process, _process())
    del int8
    _same(process, _process())


def test_what_a_model_computes_with_is_compiled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "octavo.graph.install.prepare", lambda libraries, _: asked.extend(libraries)
    )
    quantized(bert())
    places = {one.source.parent.name for one in asked}
    assert places == {"attention", "add_norm", "int8_linear", "int8_gemm", "dynamic_quantize"}
    asked.clear()
    quantized(bert(attn_implementation="eager"))
    assert asked
    assert native.LIBRARY not in asked


@in_c
def test_what_it_cannot_do_is_done_as_before(
    calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    int8 = quantized(bert())
    int8.train()
    with torch.no_grad():
        int8(**batch)
    assert not calls, "dropout"
    int8.eval()
    few = {name: value[:, :3] for name, value in batch.items()}
    last(int8, few)
    assert not calls, "too few queries"
    narrow = copy.deepcopy(int8).bfloat16()
    assert last(narrow, batch).dtype == torch.bfloat16
    assert not calls, "bfloat16"
    last(int8, batch, output_attentions=False)
    assert len(calls) == 2
    calls.clear()
    last(int8, batch)
    assert len(calls) == 2


@in_c
def test_a_loaded_checkpoint_uses_it(
    tmp_path: Any, calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    int8 = quantized(bert())
    octavo.save_quantized(int8, tmp_path / "q.safetensors")
    loaded = octavo.load_quantized(bert(), tmp_path / "q.safetensors")
    assert torch.equal(last(loaded, batch), last(int8, batch))
    assert len(calls) == 4


@in_c
def test_a_model_that_generates_uses_it(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    int8 = quantized(transformers.LlamaForCausalLM(config).eval())
    ids = torch.arange(16).reshape(2, 8)

    def generated() -> torch.Tensor:
        with torch.no_grad():
            return int8.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)

    found = generated()
    assert len(calls) == 2, "for the prompt"
    monkeypatch.setattr(native.LIBRARY, "reason", lambda: "a test")
    forget_plans()
    assert torch.equal(generated(), found)
    assert len(calls) == 2


@in_c
def test_compiled_it_is_one_operator(batch: dict[str, torch.Tensor]) -> None:
    int8 = quantized(bert(num_hidden_layers=1))
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(int8, backend=keep, fullgraph=True)
    close(last(compiled, batch), last(int8, batch))
    assert sum("octavo.attention" in name for name in seen) == 1


@in_c
def test_an_exported_program_gives_the_same_for_any_length(
    calls: list[int], batch: dict[str, torch.Tensor]
) -> None:
    int8 = quantized(bert(num_hidden_layers=1))
    tokens = torch.export.Dim("tokens", min=2, max=100)
    with torch.no_grad():
        program = torch.export.export(
            int8, (), dict(batch), dynamic_shapes={name: {1: tokens} for name in batch}
        )
    assert sum("octavo.attention" in str(node.target) for node in program.graph.nodes) == 1
    for length in (12, 3, 20):
        ids = torch.arange(3 * length).reshape(3, length) % 50
        other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found, wanted = last(program.module(), other), last(int8, other)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * 2, "too few queries for three of the calls"
