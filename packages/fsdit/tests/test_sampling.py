"""Denoising: on a flow whose answer is known, against diffusers' schedulers, and guidance in one batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit import FSDiT
from fsdit.conditioning import Condition, Context, first_frame_condition, model_input
from fsdit.flow import FlowSchedule
from fsdit.sampling import GuidedVelocity, Step, denoise

SHAPE = (2, 4, 3, 2, 2)


class GaussianFlow(nn.Module):
    """The exact velocity for data from N(mean, spread²): noise flows to mean + spread·noise."""

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread
        self.calls: list[int] = []

    def forward(self, inputs: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        self.calls.append(len(inputs))
        x = inputs[:, :4].double()
        sigma = timestep.double().view(-1, 1, 1, 1, 1) / 1000
        centred = (x - (1 - sigma) * self.mean) / ((1 - sigma) ** 2 * self.spread**2 + sigma**2)
        return sigma * centred - (self.mean + (1 - sigma) * self.spread**2 * centred)


def nothing() -> tuple[Condition, Context]:
    return Condition(torch.zeros(SHAPE), torch.zeros(SHAPE)), Context(torch.zeros(2, 1, 1))


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_a_single_point_is_reached_exactly(solver: str) -> None:
    for steps in (1, 2, 5):
        out = denoise(
            GaussianFlow(0.7, 0.0), noise(), *nothing(), schedule=FlowSchedule(5.0), steps=steps, solver=solver
        )
        assert (out - 0.7).abs().max() < 2e-5


def error(solver: str, steps: int) -> float:
    flow, schedule = GaussianFlow(0.7, 0.5), FlowSchedule(1.0)
    out = denoise(flow, noise(), *nothing(), schedule=schedule, steps=steps, solver=solver)
    return float((out - (0.7 + 0.5 * noise())).abs().max())


def test_solvers_converge_with_their_order() -> None:
    euler = [error("euler", n) for n in (20, 40, 80)]
    unipc = [error("unipc", n) for n in (20, 40, 80)]
    assert 1.8 < euler[0] / euler[1] < 2.2 and 1.8 < euler[1] / euler[2] < 2.2
    assert unipc[0] / unipc[2] > 12  # second order: about a quarter for each doubling
    assert all(u < e / 4 for u, e in zip(unipc, euler, strict=True))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_equal_to_diffusers_on_its_own_grid(solver: str) -> None:
    model, steps, shift = GaussianFlow(0.2, 0.8), 12, 5.0
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - (1 - 0.001) * i / steps for i in range(steps)])
    x = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        v = model(x, 1000 * scheduler.sigmas[index].expand(2), x, None).float()
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    ours = denoise(model, noise(), *nothing(), schedule=FlowSchedule(shift), steps=steps, solver=solver)
    assert (ours - x).abs().max() < 1e-6


def test_callback_sees_every_step_and_may_end_it() -> None:
    seen: list[Step] = []
    out = denoise(
        GaussianFlow(0.7, 0.0), noise(), *nothing(), schedule=FlowSchedule(5.0), steps=4, callback=seen.append
    )
    assert [(s.index, s.total) for s in seen] == [(i, 4) for i in range(4)]
    assert [s.sigma for s in seen] == pytest.approx(FlowSchedule(5.0).sigmas(4)[:-1].tolist(), abs=2e-6)
    assert torch.equal(seen[-1].latents, out)
    assert all((s.clean - 0.7).abs().max() < 1e-4 for s in seen)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(GaussianFlow(0, 1), noise(), *nothing(), schedule=FlowSchedule(), steps=4, callback=interrupt)


def transformer() -> FSDiT:
    torch.manual_seed(0)
    sizes = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 3, "freq_dim": 16}
    model = FSDiT(**sizes, text_dim=8, text_len=6, image_dim=8, latent_channels=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def conditions() -> tuple[Condition, Context]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = first_frame_condition(draw(2, 4, 1, 2, 2), 3)
    return first, Context(draw(2, 6, 8), draw(2, 5, 8), negative=draw(2, 6, 8))


def test_guidance_in_one_batch_equals_two_passes() -> None:
    model, (condition, context) = transformer(), conditions()
    inputs, times = model_input(noise(), condition), torch.full((2,), 640.0)
    with torch.no_grad():
        conditional = model(inputs, times, context.text, context.image)
        unconditional = model(inputs, times, context.negative, context.image)
        got = GuidedVelocity(model, condition, context, 4.0)(noise(), 640.0)
    assert (conditional - unconditional).abs().max() > 1e-3
    assert torch.allclose(got, unconditional + 4.0 * (conditional - unconditional), atol=1e-5)


def test_guidance_one_runs_one_branch() -> None:
    model, (condition, _) = GaussianFlow(0, 1), nothing()
    text = torch.zeros(2, 1, 1)
    for guidance, batch in ((1.0, 2), (3.0, 4)):
        model.calls.clear()
        context = Context(text, negative=text)
        denoise(model, noise(), condition, context, schedule=FlowSchedule(), steps=3, guidance=guidance)
        assert model.calls == [batch] * 3
    with pytest.raises(UserError, match="negative"):
        denoise(model, noise(), condition, Context(text), schedule=FlowSchedule(), steps=1, guidance=3.0)


def test_same_noise_same_result() -> None:
    model, both = transformer(), conditions()

    def run(seed: int, **options: object) -> Tensor:
        settings = {"schedule": FlowSchedule(5.0), "steps": 3, "guidance": 2.0, **options}
        return denoise(model, noise(seed), *both, **settings)

    assert torch.equal(run(0), run(0))
    for other in ({"seed": 1}, {"steps": 4}, {"guidance": 3.0}, {"solver": "euler"}, {"schedule": FlowSchedule(2.0)}):
        assert not torch.equal(run(0), run(**{"seed": 0, **other}))


def test_unknown_solver() -> None:
    with pytest.raises(UserError, match="unipc, euler"):
        denoise(GaussianFlow(0, 1), noise(), *nothing(), schedule=FlowSchedule(), steps=1, solver="heun")
