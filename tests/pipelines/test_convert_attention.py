"""octavo.convert_attention: what it converts, how exactly, and what it names instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

import octavo
from octavo import Int8Dynamic
from octavo.core.errors import InputError, UnsupportedError
from octavo.layers import (
    EfficientAttention,
    Int8Linear,
    LinearAttention,
    attention_pairs,
)
from octavo.pipelines import convert

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
KEPT = torch.ones(2, 9, dtype=torch.long)
KEPT[1, 6:] = 0
"""The second sequence has six tokens."""
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

ENCODERS = ["Bert", "Camembert", "DistilBert", "Electra", "Roberta", "XLMRoberta"]
VISION = ["DeiT", "Dinov2", "ViT"]


def convert_attention(model: nn.Module, **options: Any) -> Any:
    return octavo.convert_attention(model, verbose=False, **options)


def reasons(model: nn.Module) -> dict[str, str]:
    """Name -> why it stays, of those that do."""
    return {x.name: x.detail for x in model.octavo_summary.layers if not x.became}


def huggingface(
    name: str, kind: str = "Model", implementation: str = "sdpa", **changes: Any
) -> Any:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    if name == "DistilBert":
        settings = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if name in VISION:
        settings |= {"image_size": 16, "patch_size": 4}
    else:
        settings |= {"vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform weights of attention
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def encoder(dim: int = 32, **changes: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    settings = {"batch_first": True, "dim_feedforward": 64, "dropout": 0.1} | changes
    layer = nn.TransformerEncoderLayer(dim, 2, **settings)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def oracle(teacher: nn.Module, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Linear attention with a teacher's weights, all pairs at once, in float64.

    Args:
        teacher: a softmax attention.
        x: [B, T, C].
        keep: True for what a query may attend to, [B or 1, T or 1, T].
    """
    x, out = x.double(), None
    if isinstance(teacher, nn.MultiheadAttention):
        weights, heads, out = teacher.in_proj_weight.chunk(3), teacher.num_heads, teacher.out_proj
        biases = [None] * 3 if teacher.in_proj_bias is None else teacher.in_proj_bias.chunk(3)
        pairs = list(zip(weights, biases, strict=True))
    else:
        names = [
            ("query", "key", "value"),
            ("q_proj", "k_proj", "v_proj"),
            ("q_lin", "k_lin", "v_lin"),
        ]
        (found,) = [each for each in names if hasattr(teacher, each[0])]
        pairs = [(getattr(teacher, name).weight, getattr(teacher, name).bias) for name in found]
        heads = getattr(teacher, "num_attention_heads", None) or teacher.n_heads
        out = getattr(teacher, "o_proj", getattr(teacher, "out_lin", None))
    q, k, v = (
        nn.functional.linear(x, w.double(), None if b is None else b.double())
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for w, b in pairs
    )
    q, k = (nn.functional.elu(each) + 1 for each in (q, k))
    weights = (q @ k.mT) * keep[:, None]
    found = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    if out is None:
        return found.float()
    bias = None if out.bias is None else out.bias.double()
    return nn.functional.linear(found, out.weight.double(), bias).float()


def check_layers(
    model: nn.Module, call: Callable[[], object], keep: torch.Tensor, *, batch_first: bool = True
) -> int:
    """Compares every converted attention of a call with the oracle; how many there were."""
    seen = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, args[0] if args else kwargs["hidden_states"], output))

    pairs = attention_pairs(model)
    handles = [p.student.register_forward_hook(hook, with_kwargs=True) for p in pairs]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    assert [module for module, *_ in seen] == [pair.student for pair in pairs]
    for pair, (_, x, (out, weights)) in zip(pairs, seen, strict=True):
        assert weights is None
        turned = (each if batch_first else each.transpose(0, 1) for each in (x, out))
        x, out = turned
        torch.testing.assert_close(out, oracle(pair.teacher, x, keep), rtol=1e-4, atol=1e-4)
    return len(pairs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both"])
def test_transformer_encoder(norm_first: bool, batch_first: bool, bias: bool, mask: str) -> None:
    model = encoder(norm_first=norm_first, batch_first=batch_first, bias=bias)
    converted = convert_attention(model)
    assert converted.octavo_summary.swapped == 2
    x = torch.randn(2, 9, 32)
    keep, masks = torch.ones(2, 9, 9, dtype=torch.bool), {}
    if mask in ("padding", "both"):
        masks["src_key_padding_mask"] = KEPT == 0
        keep &= KEPT.bool()[:, None]
    if mask in ("causal", "both"):
        masks["mask"] = torch.ones(9, 9, dtype=torch.bool).triu(1)
        keep.tril_()
    given = x if batch_first else x.transpose(0, 1)
    for training in (False, True):
        converted.train(training)
        count = check_layers(
            converted, lambda: converted(given, **masks), keep, batch_first=batch_first
        )
        assert count == 2


def test_padding_changes_nothing_in_a_whole_encoder() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2
    ).eval()  # of the kind that torch turns into nested tensors and hands to a fused kernel
    assert model.use_nested_tensor
    converted, x = convert_attention(model), torch.randn(2, 9, 32)
    with torch.no_grad():
        found = converted(x, src_key_padding_mask=KEPT == 0)
        assert not torch.allclose(found, model(x, src_key_padding_mask=KEPT == 0)[:, :9])
        torch.testing.assert_close(found[:1], converted(x[:1]))
        torch.testing.assert_close(found[1:, :6], converted(x[1:, :6]))
    assert model.use_nested_tensor, "the model that was given is as it was"


def test_causal_masks_of_a_call() -> None:
    model, x = convert_attention(encoder()), torch.randn(2, 9, 32)
    attention, other = model.layers[0].self_attn, x.clone()
    other[:, 5:] = 0
    boolean = torch.ones(9, 9, dtype=torch.bool).triu(1)
    added = nn.Transformer.generate_square_subsequent_mask(9)
    with torch.no_grad():
        first = attention(x, x, x, attn_mask=boolean)[0]
        for hint in (False, True):
            for mask in (boolean, added):
                found = attention(other, other, other, attn_mask=mask, is_causal=hint)[0]
                torch.testing.assert_close(found[:, :5], first[:, :5])
        full = attention(x, x, x)[0]
        open_mask = attention(x, x, x, attn_mask=torch.zeros(9, 9))[0]
        assert torch.equal(full, open_mask)
        assert not torch.allclose(full, first)
        row = x[0]
        one = attention(row, row, row, key_padding_mask=KEPT[1] == 0)[0]
        batch = x[:1]
        torch.testing.assert_close(one, attention(batch, batch, batch, KEPT[1:] == 0)[0][0])
        always = convert_attention(encoder(), causal=True).layers[0].self_attn
        torch.testing.assert_close(always(x, x, x)[0], first)


def test_calls_that_are_refused() -> None:
    attention, x = convert_attention(encoder()).layers[0].self_attn, torch.randn(2, 9, 32)
    with pytest.raises(UnsupportedError, match=r"different tensors; only self-attention.*exclude="):
        attention(x, x + 1, x + 1)
    with pytest.raises(InputError, match="attn_mask is not the causal mask"):
        attention(x, x, x, attn_mask=torch.eye(9, dtype=torch.bool))
    with pytest.raises(InputError, match="adds numbers other than 0 and -inf"):
        attention(x, x, x, attn_mask=torch.randn(9, 9))
    with pytest.raises(InputError, match=r"attn_mask has shape \[4, 9, 9\]; .* \[9, 9\] only"):
        attention(x, x, x, attn_mask=torch.zeros(4, 9, 9))
    nested = torch.nested.nested_tensor([x[0], x[1, :4]])
    with pytest.raises(UnsupportedError, match="takes no nested tensors"):
        attention(nested, nested, nested)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "sdpa") for name in ENCODERS), ("Bert", "eager")]
)
def test_text_models_of_transformers(name: str, implementation: str) -> None:
    model = huggingface(name, implementation=implementation)
    converted = convert_attention(model)
    assert not reasons(converted)
    call = {"input_ids": IDS, "attention_mask": KEPT}
    keep = KEPT.bool()[:, None]
    assert check_layers(converted, lambda: converted(**call), keep) == 2
    with torch.no_grad():
        found = converted(**call).last_hidden_state
        short = converted(input_ids=IDS[1:, :6]).last_hidden_state
        hidden = converted(**call, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1:, :6], short, rtol=1e-4, atol=1e-4)
    assert len(hidden) == 3
    assert not torch.allclose(found, model(**call).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "sdpa") for name in VISION), ("ViT", "eager")]
)
def test_vision_models_of_transformers(name: str, implementation: str) -> None:
    for bias in (False, True):
        model = huggingface(name, implementation=implementation, qkv_bias=bias)
        converted = convert_attention(model)
        assert not reasons(converted)
        keep = torch.ones(1, 1, 1)
        assert check_layers(converted, lambda: converted(pixel_values=PIXELS), keep) == 2  # noqa: B023


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_causal_bert(implementation: str, side: str) -> None:
    model = huggingface("Bert", "LMHeadModel", implementation, is_decoder=True)
    converted = convert_attention(model)
    assert "causal" in converted.octavo_summary.layers[0].detail
    mask = KEPT.flip(1) if side == "left" else KEPT if side == "right" else torch.ones_like(KEPT)
    keep = mask.bool()[:, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    call = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
    if side == "left":  # padding that attends to nothing is 0, and 0 / 0 in the oracle
        with torch.no_grad():
            found = converted(**call).logits[1:, 3:]
            position = torch.arange(3, 9)[None]
            short = converted(IDS[1:, 3:], position_ids=position, use_cache=False).logits
        torch.testing.assert_close(found, short, rtol=1e-4, atol=1e-4)
    else:
        assert check_layers(converted, lambda: converted(**call), keep) == 2
    with pytest.raises(UnsupportedError, match="call the model with use_cache=False, or decode"):
        converted(IDS, use_cache=True)


def test_what_transformers_may_not_ask_for() -> None:
    model = convert_attention(huggingface("Bert"))
    with pytest.raises(UnsupportedError, match="no weights to return; call without output_att"):
        model(IDS, output_attentions=True)
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    square[:, :, 3, 4] = False
    with pytest.raises(InputError, match="is not a key padding mask: it hides a key from some"):
        model(IDS, attention_mask=square)
    attention, x = model.encoder.layer[0].attention.self, torch.randn(2, 9, 32)
    with pytest.raises(UnsupportedError, match="has no argument 'position_bias'"):
        attention(x, position_bias=torch.zeros(1))
    with pytest.raises(UnsupportedError, match=r"mask is a str; .*attn_implementation="):
        attention(x, "block")
    with pytest.raises(InputError, match=r"has shape \[2, 1, 9, 12\]; .* without keys of earlier"):
        attention(x, torch.ones(2, 1, 9, 12, dtype=torch.bool))
    with torch.no_grad():
        flat = attention(x, KEPT)[0]
        wide = attention(x, KEPT.bool()[:, None, None].expand(2, 1, 9, 9))[0]
    assert torch.equal(flat, wide)


class Own(nn.MultiheadAttention):
    pass


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class Lora(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Zoo(nn.Module):
    """Attentions that stay, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.MultiheadAttention(8, 2)
        self.own = Own(8, 2)
        self.kdim = nn.MultiheadAttention(8, 2, kdim=4)
        self.extra = nn.MultiheadAttention(8, 2, add_zero_attn=True)
        self.other = OwnAttention()
        self.linear = LinearAttention(8, 2)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16)
        self.lora = EfficientAttention(8, 2)
        self.lora.qkv = Lora(8, 24)
        self.normed = EfficientAttention(8, 2)
        parametrizations.weight_norm(self.normed.proj)
        self.gpt2 = huggingface_part("GPT2", n_embd=8, n_layer=1, n_head=2)
        self.t5 = huggingface_part(
            "T5", "EncoderModel", d_model=8, d_kv=4, num_layers=1, num_heads=2
        )
        self.wide = huggingface("ViT", head_dim=8)
        self.weights = huggingface("Bert", "Model", "eager", output_attentions=True)
        self.crossing = huggingface("Bert", is_decoder=True, add_cross_attention=True)


def huggingface_part(name: str, kind: str = "Model", **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **settings)
    return getattr(transformers, f"{name}{kind}")(config)


def test_what_stays_is_named() -> None:
    model = Zoo()
    stays = reasons(convert_attention(model))
    assert "good" not in stays
    assert "decoder.self_attn" not in stays
    assert "crossing.encoder.layer.0.attention.self" not in stays
    expected = {
        "own": "Own may compute something else than nn.MultiheadAttention",
        "kdim": "other sizes than its queries (kdim, vdim)",
        "extra": "adds keys of its own",
        "other": "Octavo does not know what OwnAttention computes",
        "linear": "is linear already",
        "decoder.multihead_attn": "cross attention",
        "lora": "its projections are Lora, and Linear is what can be kept",
        "normed": "parametrized",
        "gpt2.h.0.attn": "Conv1D layers",
        "t5.encoder.block.0.layer.0.SelfAttention": "relative positions",
        "wide.layers.0.attention": "its 2 heads are 16 channels together, and the model has 32",
        "weights.encoder.layer.0.attention.self": "config.output_attentions asks for its weights",
        "crossing.encoder.layer.0.crossattention.self": "cross attention",
    }
    for name, reason in expected.items():
        assert reason in stays[name], name


def test_hooks_are_not_lost() -> None:
    model = encoder()
    handle = model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    model.layers[1].self_attn.forward = model.layers[1].self_attn.forward
    stays = reasons(convert_attention(model))
    assert len(stays) == 2
    assert all("which would be lost" in reason for reason in stays.values())
    handle.remove()
    assert list(reasons(convert_attention(model))) == ["layers.1.self_attn"]
    bert = huggingface("Bert", implementation="eager")
    bert(IDS, output_attentions=True)  # transformers leaves hooks of its own
    assert bert.encoder.layer[0].attention.self._forward_hooks
    assert not reasons(convert_attention(bert))


def test_selectors() -> None:
    model = encoder()
    only = convert_attention(model, include=["layers.1.*"])
    assert reasons(only) == {"layers.0.self_attn": "not included"}
    assert reasons(convert_attention(model, exclude=["layers.0.*"])) == {
        "layers.0.self_attn": "excluded"
    }
    by_type = convert_attention(model, include=[nn.MultiheadAttention])
    assert by_type.octavo_summary.swapped == 2
    with pytest.raises(InputError, match=r"'head' matches no attention; attentions are layers.0"):
        convert_attention(model, include=["head"])


def test_an_example_shows_what_cannot_be_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.cross, self.biased, self.unused = (
                nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            x = self.good(x, x, x)[0]
            x = self.cross(x, x + 1, x + 1)[0]
            return self.biased(x, x, x, attn_mask=torch.randn(5, 5))[0]

    model, x = Model().train(), torch.randn(2, 5, 8)
    converted = convert_attention(model, example=x)
    stays = reasons(converted)
    assert list(stays) == ["cross", "biased", "unused"]
    assert "different tensors" in stays["cross"]
    assert "position biases" in stays["biased"]
    assert stays["unused"] == "the example never reached it"
    assert converted.eval()(x).isfinite().all()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match=r"the example .1 arguments.* does not fit the model"):
        convert_attention(model, example=(torch.randn(2, 5, 9),))
    assert not any(module._forward_pre_hooks for module in model.modules())
    nested = encoder().eval()
    both = convert_attention(
        nested, example={"src": torch.randn(2, 9, 32), "src_key_padding_mask": KEPT == 0}
    )
    assert both.octavo_summary.swapped == 2


def test_weights_are_copies_and_trained_as_they_were() -> None:
    model = encoder()
    model.layers[1].self_attn.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        converted = convert_attention(model)
    assert [p.requires_grad for p in converted.layers[1].self_attn.parameters()] == [False] * 4
    assert all(p.requires_grad for p in converted.layers[0].self_attn.parameters())
    old = {p.data_ptr() for p in model.parameters()}
    assert not old & {p.data_ptr() for p in converted.parameters()}
    attention = converted.layers[0].self_attn.attention
    assert isinstance(attention, LinearAttention)
    assert torch.equal(attention.qkv.weight, model.layers[0].self_attn.in_proj_weight)
    converted(torch.randn(2, 5, 32)).sum().backward()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("inplace", [False, True])
def test_pairs_for_distillation(inplace: bool) -> None:
    model, x = encoder(), torch.randn(2, 9, 32)
    softmax = [layer.self_attn for layer in model.layers]
    converted = convert_attention(model, inplace=inplace)
    assert (converted is model) == inplace
    later = copy.deepcopy(converted)
    for each in (converted, later):
        pairs = attention_pairs(each)
        assert [pair.name for pair in pairs] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert [pair.teacher for pair in pairs] == softmax
        assert [pair.student for pair in pairs] == [layer.self_attn for layer in each.layers]
    for pair in attention_pairs(later):
        assert pair.teacher(x, x, x)[0].shape == pair.student(x, x, x)[0].shape
    assert "octavo_teachers" not in "".join(converted.state_dict())
    assert attention_pairs(encoder()) == []
    again = convert_attention(converted)
    assert len(attention_pairs(again)) == 2
    assert set(reasons(again).values()) == {"is linear already"}


def test_one_attention_in_two_places() -> None:
    model = encoder()
    model.layers[1].self_attn = model.layers[0].self_attn
    converted = convert_attention(model)
    assert converted.layers[0].self_attn is converted.layers[1].self_attn
    assert converted.octavo_summary.swapped == 1


def test_a_model_that_is_one_attention() -> None:
    module = EfficientAttention(24, 3, qkv_bias=True, causal=True)
    converted = convert_attention(module)
    assert type(converted) is LinearAttention
    assert converted.causal
    assert attention_pairs(converted)[0].teacher is module
    assert attention_pairs(converted)[0].student is converted
    with pytest.raises(InputError, match=r"is itself a EfficientAttention.*inplace=False"):
        convert_attention(module, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_failure_leaves_the_model_as_it_was(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder()
    before, held = copy.deepcopy(model.state_dict()), [layer.self_attn for layer in model.layers]

    def fail(module: nn.Module, edits: object) -> None:
        if isinstance(module, nn.TransformerEncoderLayer):
            raise KeyboardInterrupt

    monkeypatch.setattr(convert, "keep_off_fused_kernels", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_attention(model, inplace=inplace)
    assert [layer.self_attn for layer in model.layers] == held
    assert not hasattr(model, "octavo_summary")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"the model is a str; give a torch\.nn\.Module"):
        convert_attention("bert")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="to is 'mamba'; attention can be converted to 'linear'"):
        convert_attention(encoder(), to="mamba")
    with pytest.raises(InputError, match="the model has no attention"):
        convert_attention(nn.Linear(8, 8))


def test_the_summary_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    octavo.convert_attention(encoder(), exclude=["layers.1.*"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "1 of 2 attentions are linear; the model takes" in text
    assert "accuracy drops until the model is distilled or fine-tuned" in text
    assert "attention_pairs(model)" in text
    assert "without the dropout 0.1 of its weights" in text
    octavo.convert_attention(encoder(), exclude=["*"])
    assert "distilled" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["encoder", "Bert"])
@torch.no_grad()
def test_then_quantized_compiled_exported_and_stored(name: str, tmp_path: Any) -> None:
    x, padding = torch.randn(2, 9, 128), KEPT == 0
    if name == "encoder":
        model: nn.Module = encoder(128)
        call: dict[str, Any] = {"src": x, "src_key_padding_mask": padding}
    else:
        model = huggingface("Bert", hidden_size=128)
        call = {"input_ids": IDS, "attention_mask": KEPT}
    converted = convert_attention(model)
    quantized = octavo.quantize(converted, Int8Dynamic(), verbose=False)
    for pair in attention_pairs(quantized):
        assert isinstance(pair.student.attention.qkv, Int8Linear)
    path = octavo.save_quantized(quantized, tmp_path / "model.safetensors")
    loaded = octavo.load_quantized(convert_attention(model), path)

    def result(each: Any) -> torch.Tensor:
        out = each(**call)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    assert torch.equal(result(loaded), result(quantized))
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(compiled), result(converted), rtol=1e-4, atol=1e-4)
    program = torch.export.export(quantized, (), call).module()
    torch.testing.assert_close(result(program), result(quantized), rtol=1e-4, atol=1e-4)
