"""The start from scratch: activations stay near the shortcuts, and the injection is open."""

from __future__ import annotations

import torch

from fsae import FSAE
from fsae.weights.initialization import start_innermost_as_shortcuts, start_small


@torch.no_grad()
def test_activations_stay_small_and_the_first_frame_is_seen() -> None:
    def outer_level(small: bool) -> tuple[float, float]:
        """Root mean square of what the finest decoder stage gives, and how far a changed first frame changes it."""
        torch.manual_seed(0)
        model = FSAE.from_preset("nano").eval()
        if small:
            start_small(model)
        levels: list[torch.Tensor] = []
        model.decoder.stages[0].register_forward_hook(lambda _module, _inputs, out: levels.append(out))
        video = torch.rand(1, 3, 1, 64, 64) * 2 - 1
        latents = model.encode(video)
        model.decode(latents, video)
        model.decode(latents, -video)
        level = levels[0].square().mean().sqrt()
        return float(level), float((levels[1] - levels[0]).square().mean().sqrt() / level)

    plain, blind = outer_level(small=False)
    small, seeing = outer_level(small=True)
    assert small < 3 < plain
    assert blind == 0
    assert seeing > 0.1


@torch.no_grad()
def test_the_innermost_stage_starts_as_shortcuts_and_can_learn() -> None:
    torch.manual_seed(0)
    model = FSAE(
        widths=(4, 4, 8, 32, 32, 32, 64),
        encoder_depths=(1,) * 7,
        decoder_depths=(1,) * 7,
        latent_channels=16,
        decoder_kind="causal",
        first_frame_injection=False,
    )
    outer = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_innermost_as_shortcuts(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, outer[name])}
    inner = ("encoder.stages.6.", "encoder.stages.5.down.", "decoder.stages.6.", "decoder.stages.5.up.")
    assert changed and all(name.startswith(inner) for name in changed)
    x = torch.randn(1, 64, 2, 2, 2)
    for stack in (model.encoder, model.decoder):
        assert torch.equal(stack.stages[6].blocks[0](x), x)
    below = torch.randn(1, 32, 2, 4, 4)
    torch.testing.assert_close(model.encoder.stages[5].down(below), model.encoder.stages[5].down.shortcut(below))
    torch.testing.assert_close(model.decoder.stages[5].up(x), model.decoder.stages[5].up.shortcut(x))
    with torch.enable_grad():
        model(torch.randn(1, 3, 5, 64, 64)).square().mean().backward()
    for name in ("encoder.stages.6.blocks.0.local.norm.weight", "encoder.stages.5.down.conv.weight"):
        assert model.get_parameter(name).grad.abs().max() > 0
    for name in ("decoder.stages.6.blocks.0.attention.norm.weight", "decoder.stages.5.up.conv.weight"):
        assert model.get_parameter(name).grad.abs().max() > 0
