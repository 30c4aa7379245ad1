"""Denoising: on a flow whose answer is known, against diffusers' schedulers, and guidance in one batch."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit import FSDiT
from fsdit.conditioning import Condition, Context, first_frame_condition, model_input
from fsdit.flow.capture import CapturedDenoise
from fsdit.flow.path import FlowSchedule
from fsdit.flow.sampling import GuidedVelocity, Step, denoise
from fsdit.flow.solvers import UniPC
from fsdit.layers.context import ContextCache

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


@pytest.mark.parametrize("steps", [1, 2, 3, 12, 30])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_equal_to_diffusers_on_its_own_grid(solver: str, steps: int) -> None:
    model, shift = GaussianFlow(0.2, 0.8), 5.0
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
    assert (ours - x).abs().max() < 2e-6


def test_callback_sees_every_step_and_may_end_it() -> None:
    seen: list[Step] = []
    out = denoise(
        GaussianFlow(0.7, 0.0), noise(), *nothing(), schedule=FlowSchedule(5.0), steps=4, callback=seen.append
    )
    assert [(s.index, s.total) for s in seen] == [(i, 4) for i in range(4)]
    assert [s.sigma for s in seen] == pytest.approx(FlowSchedule(5.0).sigmas(4)[:-1], abs=2e-6)
    assert torch.equal(seen[-1].latents, out)
    assert all((s.clean - 0.7).abs().max() < 1e-4 for s in seen)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(GaussianFlow(0, 1), noise(), *nothing(), schedule=FlowSchedule(), steps=4, callback=interrupt)


def test_a_callback_stops_with_the_clean_estimate() -> None:
    seen: list[Step] = []

    def stop(step: Step) -> bool:
        seen.append(step)
        return step.index == 1

    out = denoise(GaussianFlow(0.3, 0.5), noise(), *nothing(), schedule=FlowSchedule(5.0), steps=6, callback=stop)
    assert len(seen) == 2
    assert torch.equal(out, seen[-1].clean) and not torch.equal(out, seen[-1].latents)


def transformer() -> FSDiT:
    torch.manual_seed(0)
    model = FSDiT.from_preset("tiny", text_dim=8, text_len=6, image_dim=8, latent_channels=4)
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


def test_one_prompt_and_one_negative_serve_a_batch() -> None:
    model, (condition, context) = transformer(), conditions()
    text, negative = context.text[:1], context.negative[:1]
    repeated = Context(text.expand(2, -1, -1), context.image, negative.expand(2, -1, -1))
    with torch.no_grad():
        expected = GuidedVelocity(model, condition, repeated, 4.0)(noise(), 640.0)
        got = GuidedVelocity(model, condition, Context(text, context.image, negative), 4.0)(noise(), 640.0)
    assert torch.equal(got, expected)
    with pytest.raises(UserError, match="give both at one length"):
        GuidedVelocity(model, condition, Context(text, context.image, negative[:, :3]), 4.0)


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


# --- what is kept from step to step, and what the host has to wait for ------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_kept_keys_and_values_change_nothing(batch: int) -> None:
    model, (condition, context) = transformer(), conditions()
    condition = Condition(condition.latents[:batch], condition.mask[:batch])
    context = Context(context.text[:batch], context.image[:batch], context.negative[:batch])
    made: list[int] = []
    embedded: list[int] = []
    for embedding in (model.text_embedding, model.image_embedding):
        embedding.register_forward_hook(lambda *_: embedded.append(1))
    for block in model.blocks:
        block.cross_attn.to_kv.register_forward_hook(lambda *_: made.append(1))

    def plainly(inputs: Tensor, times: Tensor, text: Tensor, image: Tensor) -> Tensor:
        return model(inputs, times, text, image.expand(len(inputs), -1, -1) if len(image) == 1 else image)

    options = {"schedule": FlowSchedule(5.0), "steps": 4, "guidance": 3.0}
    kept = denoise(model, noise()[:batch], condition, context, **options)
    assert len(made) == len(model.blocks) and len(embedded) == 2  # once in all four steps
    again = denoise(plainly, noise()[:batch], condition, context, **options)
    assert len(made) == len(model.blocks) * 5
    # Four steps in fp32 of values up to 3: other matrix shapes, other roundings.
    assert (kept - again).abs().max() < 1e-5


def test_a_cache_follows_its_prompt_and_its_model_and_carries_no_gradients() -> None:
    model, (_, context) = transformer(), conditions()
    latents, times, cache = torch.randn(2, 12, 3, 2, 2), torch.tensor([100.0, 500.0]), ContextCache()
    with torch.no_grad():
        for text in (context.text, context.negative, context.text):
            expected = model(latents, times, text, context.image)
            assert torch.equal(model(latents, times, text, context.image, cache=cache), expected)
            assert torch.equal(model(latents, times, text, context.image, cache=cache), expected)
        other = copy.deepcopy(model)  # which finds none of its own layers in the cache
        other.text_embedding[0].weight.mul_(2)
        expected = other(latents, times, context.text, context.image)
        assert torch.equal(other(latents, times, context.text, context.image, cache=cache), expected)
    with pytest.raises(ValueError, match="no_grad"):
        model(latents, times, context.text, context.image, cache=cache)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_the_host_never_waits_for_the_device(solver: str) -> None:
    """On the meta device nothing has a value: a loop that asks for one fails."""
    model, (condition, context) = transformer().to("meta"), conditions()
    condition = Condition(condition.latents.to("meta"), condition.mask.to("meta"))
    context = Context(context.text.to("meta"), context.image.to("meta"), context.negative.to("meta"))
    out = denoise(
        model, noise().to("meta"), condition, context, schedule=FlowSchedule(), steps=4, guidance=3.0, solver=solver
    )
    assert out.shape == SHAPE and out.dtype == torch.float32
    with pytest.raises(RuntimeError):  # the control: such a question does fail
        bool(out.sum() > 0)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.slow
def test_the_whole_loop_compiles() -> None:
    torch._dynamo.reset()
    model, both = transformer(), conditions()
    options = {"schedule": FlowSchedule(5.0), "steps": 3, "guidance": 3.0}
    expected = denoise(model, noise(), *both, **options)
    compiled = torch.compile(denoise, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(model, noise(), *both, **options), expected, atol=1e-5)
    torch._dynamo.reset()


def test_a_cuda_graph_needs_a_gpu_and_no_callback() -> None:
    options = {"schedule": FlowSchedule(), "steps": 2}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="NVIDIA"):
            CapturedDenoise(transformer(), noise(), *conditions(), **options)
        return
    model, both = transformer().cuda(), conditions()
    moved = [
        type(group)(**{name: value.cuda() for name, value in vars(group).items() if value is not None})
        for group in both
    ]
    captured = CapturedDenoise(model, noise().cuda(), *moved, **options, guidance=2.0)
    for seed in (1, 2):
        expected = denoise(model, noise(seed).cuda(), *moved, **options, guidance=2.0)
        assert torch.allclose(captured(noise(seed).cuda(), *moved), expected, atol=1e-5)
    with pytest.raises(UserError, match="callback"):
        CapturedDenoise(model, noise().cuda(), *moved, **options, callback=print)


def test_unipc_weights_sum_to_one_where_they_must() -> None:
    """A constant estimate m moves z along the straight line to m: each update keeps z = (1 - s)·m + s·n exactly."""
    solver = UniPC([1.0, 0.8, 0.55, 0.3, 0.1, 0.0])
    for weights, (start, end) in zip(
        [*solver._predict, *solver._correct], [*zip(solver.sigmas, solver.sigmas[1:], strict=False)] * 2, strict=False
    ):
        kept = weights.clean + weights.before + weights.ahead
        assert weights.x * start == pytest.approx(end, abs=1e-12)
        assert weights.x * (1 - start) + kept == pytest.approx(1 - end, abs=1e-9)
