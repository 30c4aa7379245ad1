"""Training: what the loss is, that it learns, that its options reach it, and the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsae import FSAE
from fsae.data.config import ClipsConfig
from fsae.errors import UserError
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit import FSDiT
from fsdit.cli import main
from fsdit.conditioning import (
    Condition,
    Encoders,
    ImageEncoder,
    TextEncoder,
    first_frame_condition,
    load_encoders,
    nano_tokenizer,
)
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.flow.path import FlowSchedule
from fsdit.training.config import TransformerConfig
from fsdit.training.data import Samples
from fsdit.training.run import train_transformer
from fsdit.training.task import FlowMatchingTask


def config(tmp_path: Any, **changes: Any) -> TransformerConfig:
    loop = LoopConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=changes.pop("max_steps", 60),
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-3),
        schedule=ScheduleConfig(kind="constant"),
        ema_decay=0.0,
        tensorboard=False,
        save_every=0,
    )
    return TransformerConfig(data="", autoencoder="", loop=loop, **changes)


def parts(**overrides: Any) -> tuple[FSDiT, Encoders]:
    torch.manual_seed(0)
    transformer = FSDiT.from_preset("tiny", **{"latent_channels": 4, **overrides})
    text, image = new_text_encoder("tiny"), new_image_encoder("tiny")
    return transformer, Encoders(TextEncoder(text.eval(), nano_tokenizer(), 16), ImageEncoder(image))


def clips(count: int = 64, permuted: bool = False) -> list[dict[str, Any]]:
    """Clips of 3 latents that go up or down from nought, as caption and picture say.

    `permuted` gives each clip another one's caption and picture, so that they tell nothing.
    """
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    latents = sign.view(-1, 1, 1, 1, 1) * torch.tensor([0.0, 2.0, 2.0]).view(1, 1, 3, 1, 1).expand(count, 4, 3, 1, 1)
    if permuted:
        sign = sign[torch.randperm(count, generator=generator)]
    captions = ["up" if s > 0 else "down" for s in sign.tolist()]
    images = (0.5 * sign).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return [{"latents": z, "caption": c, "image": i} for z, c, i in zip(latents, captions, images, strict=True)]


def batch(source: Any, count: int = 4) -> dict[str, Any]:
    return torch.utils.data.default_collate([source[i] for i in range(count)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the loss ----------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """In the transformer's place: records its inputs and answers with a constant."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer = answer
        peer = FSDiT.from_preset("tiny", latent_channels=4)
        self.config, self.public_config = peer.config, peer.public_config

    def forward(self, inputs: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:
        self.seen = inputs, timestep, text, image
        return self.weight + (torch.zeros_like(inputs[:, :4]) if self.answer is None else self.answer)


@pytest.mark.parametrize("elements", [False, True])
def test_loss_is_the_formula(tmp_path, elements: bool) -> None:
    """Flow matching, logit-normal shifted levels and pseudo-Huber, each written out in float64."""
    _, encoders = parts()
    flow = FlowSchedule(shift=3.0, mean=0.5, std=0.7)
    settings = config(tmp_path, caption_dropout=0.0, huber_delta=0.4, huber_elements=elements, flow=flow)
    data = batch(clips())
    latents = data["latents"]
    draw = generator(7)
    noise = torch.randn(latents.shape, generator=draw)
    normal = torch.randn(4, generator=draw).double()
    level = 1 / (1 + (-(0.5 + 0.7 * normal)).exp())
    sigma = 3 * level / (1 + 2 * level)

    oracle = Oracle()
    out = FlowMatchingTask(oracle, encoders, settings).loss(data, generator(7))
    error = (noise - latents).double().flatten(1)
    squares = error.square() if elements else error.square().mean(1)
    assert out["loss"].item() == pytest.approx(((squares + 0.4**2).sqrt() - 0.4).mean().item(), rel=1e-6)
    assert out["mse"].item() == pytest.approx(error.square().mean().item(), rel=1e-6)
    inputs, timestep, seen_text, seen_image = oracle.seen
    assert torch.allclose(timestep.double(), 1000 * sigma, rtol=1e-6)
    s = sigma.view(-1, 1, 1, 1, 1)
    assert torch.allclose(inputs[:, :4].double(), (1 - s) * latents + s * noise, atol=1e-6)
    assert inputs[:, 4:8, 0].eq(1).all() and not inputs[:, 4:8, 1:].any()
    assert torch.equal(inputs[:, 8:, 0], latents[:, :, 0]) and not inputs[:, 8:, 1:].any()
    assert torch.equal(seen_text, encoders.text(data["caption"]).embeddings)
    assert torch.equal(seen_image, encoders.image(data["image"]))

    oracle = Oracle(noise - latents)  # whoever knows the answer has no loss
    assert FlowMatchingTask(oracle, encoders, settings).loss(data, generator(7))["loss"].item() == 0


def test_a_prepared_batch_is_what_the_loss_is_of(tmp_path) -> None:
    _, encoders = parts()
    data = batch(clips())
    oracle = Oracle()
    task = FlowMatchingTask(oracle, encoders, config(tmp_path, caption_dropout=0.0))
    task.loss(data, generator(7))
    inputs, _, words, picture = oracle.seen
    task.config = config(tmp_path, caption_dropout=1.0)  # which is the loss's own
    clean = task.prepare(data, generator(7))
    assert torch.equal(clean.latents, data["latents"])
    assert torch.equal(torch.cat((clean.condition.mask, clean.condition.latents), dim=1), inputs[:, 4:])
    assert torch.equal(clean.context.text, words) and torch.equal(clean.context.image, picture)
    assert torch.equal(clean.context.negative, encoders.text([""] * 4).embeddings)
    assert not torch.allclose(clean.context.negative, words, atol=1e-3)


def test_a_batch_has_the_gradient_of_its_samples_mean(tmp_path) -> None:
    transformer, encoders = parts()
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2)
    task = FlowMatchingTask(transformer, encoders, config(tmp_path, encoders="frozen"))
    data = batch(clips(), 2)
    noise, sigma = torch.randn(data["latents"].shape, generator=generator()), torch.tensor([0.3, 0.8])

    def gradients(rows: list[slice]) -> list[Tensor]:
        transformer.zero_grad()
        for row in rows:
            part = {name: value[row] for name, value in data.items()}
            loss = task.velocity_loss(task.prepare(part, generator()), noise[row], sigma[row])["loss"]
            (loss / len(rows)).backward()
        return [parameter.grad.clone() for parameter in transformer.parameters()]

    for together, apart in zip(gradients([slice(2)]), gradients([slice(0, 1), slice(1, 2)]), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_every_trained_tensor_has_a_gradient(tmp_path) -> None:
    transformer, encoders = parts()
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2)
    task = FlowMatchingTask(transformer, encoders, config(tmp_path))
    task.loss(batch(clips(), 8), generator())["loss"].backward()
    trained = [(name, p) for m in task.modules.values() for name, p in m.named_parameters() if p.requires_grad]
    idle = {name for name, p in trained if p.grad is None or not p.grad.norm() > 0}
    # Softmax does not see what all keys share.
    assert {name for name in idle if not name.endswith("k_proj.bias")} == set()


def test_caption_dropout_gives_the_empty_prompt(tmp_path) -> None:
    _, encoders = parts()
    data = batch(clips(64), 64)
    empty = encoders.text([""]).embeddings[0]
    shares = {}
    for p in (0.0, 0.3, 1.0):
        oracle = Oracle()
        FlowMatchingTask(oracle, encoders, config(tmp_path, caption_dropout=p)).loss(data, generator())
        shares[p] = sum(torch.allclose(row, empty, atol=1e-5) for row in oracle.seen[2]) / 64
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.15 < shares[0.3] < 0.45


def test_loss_follows_its_generator(tmp_path) -> None:
    transformer, encoders = parts()
    task = FlowMatchingTask(transformer, encoders, config(tmp_path))
    a, b, c = (task.loss(batch(clips()), generator(seed))["loss"].item() for seed in (1, 1, 2))
    assert a == b != c


def test_what_is_trained(tmp_path) -> None:
    for trained in (True, False):
        transformer, encoders = parts()
        options = {"encoders": "elsewhere", "train_encoders": trained}
        task = FlowMatchingTask(transformer, encoders, config(tmp_path, **options))
        assert set(task.modules) == {"transformer", *(("text_encoder", "image_encoder") if trained else ())}
        assert set(task.frozen) == (set() if trained else {"text_encoder", "image_encoder"})
        torch.nn.init.normal_(transformer.head.head.weight)
        task.loss(batch(clips()), generator())["loss"].backward()
        parameters = [p for m in task.modules.values() for p in m.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in parameters)  # none is waited for in vain by several processes
        assert (encoders.text.model.shared.weight.grad is not None) == trained
    assert config(tmp_path).trains_encoders
    assert not config(tmp_path, encoders="elsewhere").trains_encoders


def test_routers_have_their_own_rate_and_no_decay(tmp_path) -> None:
    transformer, encoders = parts()
    task = FlowMatchingTask(transformer, encoders, config(tmp_path, router_rate=7.0))
    groups = task.parameter_groups(OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
    routers = {id(p) for p in transformer.router_parameters()}
    assert len(routers) == 4
    (own,) = [g for g in groups if any(id(p) in routers for p in g["params"])]
    assert {id(p) for p in own["params"]} == routers
    assert own["lr"] == pytest.approx(7e-3) and own["weight_decay"] == 0.0
    everything = [id(p) for g in groups for p in g["params"]]
    wanted = [id(p) for m in task.modules.values() for p in m.parameters() if p.requires_grad]
    assert sorted(everything) == sorted(wanted)


# --- clips of one frame ------------------------------------------------------------------------------------------


def stills(count: int = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    """One batch of pictures with their latents, the same batch with embeddings in place of caption and picture."""
    draw = generator(3)
    latents = torch.randn(count, 4, 1, 2, 2, generator=draw)
    images = torch.rand(count, 3, 16, 16, generator=draw) * 2 - 1
    fresh = {"latents": latents, "caption": ["a"] * count, "image": images}
    embeddings = {"text": torch.randn(count, 16, 32), "image_embedding": torch.randn(count, 5, 16)}
    return fresh, {"latents": latents, "caption": ["a"] * count, **embeddings}


@pytest.mark.parametrize("kept", [False, True])
def test_a_still_is_shown_nothing_of_itself(tmp_path, kept: bool) -> None:
    _, encoders = parts()
    data = stills()[kept]
    seen: dict[bool, Any] = {}
    for shown in (False, True):
        settings = config(tmp_path, stills_see_image=shown, caption_dropout=0.0)
        oracle = Oracle()
        task = FlowMatchingTask(
            oracle, None if kept else encoders, settings, clips=Samples(empty_text=torch.zeros(16, 32))
        )
        task.loss(data, generator())
        seen[shown] = oracle.seen
        inputs, _, words, _ = oracle.seen
        assert not inputs[:, 4:].any()  # mask and condition
        assert words.any()
    assert not seen[False][3].any()
    own = data["image_embedding"] if kept else encoders.image(data["image"])
    assert torch.equal(seen[True][3], own) and seen[False][3].shape == own.shape


def test_a_still_is_validated_and_sampled_without_itself(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = FSAE.from_preset("tiny", latent_channels=4).eval()
    videos = [{"video": torch.rand(3, 1, 64, 64) * 2 - 1, "caption": "a"}]
    held_out = torch.utils.data.default_collate(videos)
    shown: list[Any] = []
    decoded: list[Any] = []
    monkeypatch.setattr("fsdit.training.task.denoise", lambda *given, **_: shown.append(given) or given[1])
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda *given: decoded.append(given) or decode(*given))
    task = FlowMatchingTask(*parts(), config(tmp_path), autoencoder, Samples(batch=held_out))
    with torch.no_grad():
        assert task.validate(0)["samples"].isfinite().all()
    (_, _, condition, context), (_, first_frame) = shown[0], decoded[0]
    assert not (condition.latents.any() or condition.mask.any() or context.image.any())
    assert context.text.any() and first_frame is None


def test_trained_encoders_go_along_with_stills(tmp_path) -> None:
    transformer, encoders = parts()
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2)
    task = FlowMatchingTask(transformer, encoders, config(tmp_path))
    task.loss(stills()[0], generator())["loss"].backward()
    trained = [p for module in task.modules.values() for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not any(p.grad.any() for p in encoders.image.model.parameters() if p.grad is not None)


class Unlearnable(torch.utils.data.Dataset[dict[str, Any]]):
    """Stills drawn anew in each epoch; what the image encoder would give of one holds all of it."""

    def __len__(self) -> int:
        return 64

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        latents = torch.randn(4, 1, 1, 1, generator=generator(1 + 1000 * epoch + index))
        own = latents.view(1, 4)
        features = torch.cat((own, -own, torch.full_like(own, 3), torch.full_like(own, -3)), dim=1)
        return {"latents": latents, "text": torch.zeros(1, 32), "image_embedding": features, "caption": "a"}


class Shown(FlowMatchingTask):
    """The control: every clip's first latent is known."""

    def conditioned_latents(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Condition]:
        latents = batch["latents"]
        return latents, first_frame_condition(latents[:, :, :1], latents.shape[2])


@pytest.mark.slow
def test_no_still_is_learned_below_the_floor(tmp_path) -> None:
    """At s = 1/2 the noised latents z = (z0 + eps) / 2 are independent of v = eps - z0 ~ N(0, 2): nobody who is not
    shown z0 can do better than to answer 0, whose loss per element is E sqrt(v^2 + delta^2) - delta."""
    delta = 0.1
    v = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = (-(v**2) / 4).exp() / (4 * torch.pi) ** 0.5
    floor = float(torch.trapezoid(((v**2 + delta**2).sqrt() - delta) * density, v))

    def last_losses(name: str, kind: type[FlowMatchingTask], **changes: Any) -> float:
        losses: list[float] = []

        class Watched(kind):  # type: ignore[misc, valid-type]
            def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
                output = super().loss(batch, generator)
                losses.append(output["loss"].item())
                return output

        settings = config(
            tmp_path / name,
            max_steps=150,
            flow=FlowSchedule(1.0, std=1e-4),
            huber_delta=delta,
            huber_elements=True,
            encoders="kept",
            **changes,
        )
        transformer, _ = parts(num_layers=2)
        task = Watched(transformer, None, settings, clips=Samples(empty_text=torch.zeros(1, 32)))
        train(task, Unlearnable(), replace(settings.loop, batch_size=64))
        return sum(losses[-50:]) / 50

    # The mean of 50 steps of 256 elements has a standard error of 0.7 % of it.
    assert last_losses("as it is", FlowMatchingTask) > 0.97 * floor
    assert last_losses("condition", Shown) < 0.3 * floor
    assert last_losses("image", FlowMatchingTask, stills_see_image=True) < 0.5 * floor


# --- learning ----------------------------------------------------------------------------------------------------


def trained_loss(tmp_path: Any, permuted: bool) -> tuple[float, float]:
    """Loss on the clips before and after training; so noisy that only the conditions tell what they are."""
    data = clips(permuted=permuted)
    settings = config(
        tmp_path / str(permuted), max_steps=30, caption_dropout=0.0, flow=FlowSchedule(20.0), encoders="as they are"
    )
    task = FlowMatchingTask(*parts(num_layers=2), settings, clips=Samples(batch=batch(data, 32)))
    with torch.no_grad():
        before = float(task.validate(0)["loss"])
    train(task, data, settings.loop)
    with torch.no_grad():
        return before, float(task.validate(0)["loss"])


def test_learns_and_uses_its_conditions(tmp_path) -> None:
    before, after = trained_loss(tmp_path, permuted=False)
    assert after < 0.5 * before
    before, control = trained_loss(tmp_path, permuted=True)  # the same clips with another clip's caption and picture
    assert control > 0.75 * before


def test_from_videos_to_a_saved_model(tmp_path) -> None:
    torch.manual_seed(0)
    FSAE.from_preset("tiny", latent_channels=4).save_pretrained(tmp_path / "fsae")
    FSDiT.from_preset("tiny", latent_channels=4, text_dim=128, image_dim=128).save_pretrained(
        tmp_path / "dit"
    )  # as the nano encoders
    videos = [{"video": torch.rand(3, 5, 64, 128) * 2 - 1, "caption": c} for c in ("left", "right", "up")]
    base = config(tmp_path, max_steps=2, gradient_checkpointing=True, validation_steps=2, validation_samples=2)
    settings = replace(
        base,
        autoencoder=str(tmp_path / "fsae"),
        model=str(tmp_path / "dit"),
        clips=ClipsConfig(5, 64, 128),
        loop=replace(base.loop, batch_size=2, validate_every=1, ema_decay=0.9),
    )
    folders = train_transformer(settings, dataset=videos)
    assert [f.name for f in folders] == ["transformer", "text_encoder", "image_encoder", "tokenizer"]
    trained = FSDiT.from_pretrained(folders[0])
    old = FSDiT.from_pretrained(tmp_path / "dit")
    assert not torch.equal(trained.head.head.weight, old.head.head.weight)
    load_encoders(tmp_path / "run", 16)
    assert not (tmp_path / "run" / "validation").exists() or (tmp_path / "run" / "samples").is_dir()


def test_clips_and_their_latents_have_the_same_loss(tmp_path) -> None:
    torch.manual_seed(0)
    autoencoder = FSAE.from_preset("tiny", latent_channels=4).eval()
    videos = torch.rand(4, 3, 5, 64, 128) * 2 - 1
    clips = {"video": videos, "caption": [*"abcd"]}
    with torch.no_grad():
        latents = {"latents": autoencoder.encode(videos), "image": videos[:, :, 0], "caption": [*"abcd"]}
    transformer, encoders = parts()
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    task = FlowMatchingTask(transformer, encoders, config(tmp_path), autoencoder)
    losses = [task.loss(given, generator())["loss"].item() for given in (latents, clips)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    without = FlowMatchingTask(transformer, encoders, config(tmp_path))
    with pytest.raises(UserError, match="give the autoencoder"):
        without.loss(clips, generator())


def test_validation_shows_samples(tmp_path) -> None:
    torch.manual_seed(0)
    autoencoder = FSAE.from_preset("tiny", latent_channels=4).eval()
    videos = [{"video": torch.rand(3, 5, 64, 64) * 2 - 1, "caption": "a"}]
    held_out = torch.utils.data.default_collate(videos)
    pictures = []
    for changes in ({}, {"validation_steps": 5}, {"validation_guidance": 6.0}):
        transformer, encoders = parts()
        torch.manual_seed(1)
        torch.nn.init.normal_(transformer.head.head.weight, std=0.2)
        settings = config(tmp_path, **{"validation_steps": 2, **changes})
        task = FlowMatchingTask(transformer, encoders, settings, autoencoder, Samples(batch=held_out))
        with torch.no_grad():
            result = task.validate(0)
        assert result["loss"].ndim == 0
        assert result["samples"].shape == (3, 2 * 64, 3 * 64)  # the clip above the sample; first, middle, last frame
        assert result["samples"].min() >= 0 and result["samples"].max() <= 1
        pictures.append(result["samples"])
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    assert FlowMatchingTask(*parts(), config(tmp_path)).validate(0) == {}


def test_a_validation_encodes_its_clips_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder, (transformer, encoders) = FSAE.from_preset("tiny", latent_channels=4).eval(), parts()
    calls: list[Any] = []
    encode = autoencoder.encode
    monkeypatch.setattr(autoencoder, "encode", lambda video: calls.append("video") or encode(video))
    encoders.image.register_forward_hook(lambda *_: calls.append("image"))
    encoders.text.register_forward_pre_hook(lambda _, given: calls.append(list(given[0])))
    held_out = batch([{"video": torch.rand(3, 5, 64, 64) * 2 - 1, "caption": c} for c in "ab"], 2)
    settings = config(tmp_path, validation_steps=2, caption_dropout=1.0)
    with torch.no_grad():
        assert "samples" in FlowMatchingTask(
            transformer, encoders, settings, autoencoder, Samples(batch=held_out)
        ).validate(0)
    assert sorted(map(str, calls)) == sorted(["video", "image", "['a', 'b']", "['', '']"])


# --- what does not fit -------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_named(tmp_path) -> None:
    for wrong, part in (({"text_dim": 64}, "text encoder"), ({"image_dim": 64}, "image encoder")):
        with pytest.raises(UserError, match=f"{part} gives .* channels, the transformer takes 64"):
            FlowMatchingTask(*parts(**wrong), config(tmp_path))
    with pytest.raises(UserError, match="image encoder gives .* the transformer takes none"):
        FlowMatchingTask(*parts(image_dim=None), config(tmp_path))
    with pytest.raises(UserError, match="autoencoder gives 4"):
        FlowMatchingTask(*parts(latent_channels=8), config(tmp_path), FSAE.from_preset("tiny", latent_channels=4))
    with pytest.raises(UserError, match="neither a preset"):
        train_transformer(config(tmp_path, model="nanno"))


def test_impossible_settings_are_refused(tmp_path) -> None:
    for bad in ({"caption_dropout": 1.5}, {"huber_delta": 0.0}, {"router_rate": -1.0}, {"validation_steps": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            config(tmp_path, **bad)
    with pytest.raises(UserError, match="random weights"):
        config(tmp_path, train_encoders=False)


# --- command line ------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    code = """
import sys
from fsdit.cli import main
for argv in (["--help"], ["train", "--help"]):
    assert main(argv) == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--flow.shift", "--huber_delta", "--loop.optimizer.learning_rate", "--caption_dropout"):
        assert flag in done.stdout


def test_flags_override_the_file(tmp_path, monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr("fsdit.training.run.train_transformer", lambda config: seen.append(config) or [tmp_path / "x"])
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: clips\nautoencoder: ae\nflow: {shift: 7.0, std: 2.0}\nloop: {output_dir: out, max_steps: 5}\n"
    )
    assert main(["train", "--config", str(file), "--flow.std", "3.0", "--loop.max_steps", "9"]) == 0
    assert f"saved {tmp_path / 'x'}" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # another process of the run
    assert main(["train", "--config", str(file)]) == 0
    assert "saved" not in capsys.readouterr().out
    got, _ = seen
    assert got.flow == FlowSchedule(shift=7.0, std=3.0)
    assert (got.data, got.autoencoder, got.loop.output_dir, got.loop.max_steps) == ("clips", "ae", "out", 9)


def test_errors_are_one_sentence(tmp_path, capsys) -> None:
    required = ["--data", "d", "--autoencoder", str(tmp_path / "none"), "--loop.output_dir", str(tmp_path / "o")]
    assert main(["train", *required]) == 2
    err = capsys.readouterr().err
    assert "no model folder" in err and "Traceback" not in err
    assert main(["train", *required, "--flow.shift", "-1"]) == 2
    assert "above 0" in capsys.readouterr().err
