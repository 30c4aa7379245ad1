"""The start from scratch: activations stay near the shortcuts, and the injection is open."""

from __future__ import annotations

import torch

from fsae import FSAE
from fsae.initialization import start_small


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
