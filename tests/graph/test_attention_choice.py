"""octavo.convert_attention: what it takes, what it names instead, pairs, and what comes after."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from convertible import IDS, KEPT, convert_attention, encoder, huggingface, reasons
from torch import nn
from torch.nn.utils import parametrizations

import octavo
from octavo import Int8Dynamic, attention_pairs
from octavo.core.errors import InputError
from octavo.layers import (
    EfficientAttention,
    Int8Linear,
    LinearAttention,
)
from octavo.pipelines import convert


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

    def fail(module: nn.Module, patch: object) -> None:
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
