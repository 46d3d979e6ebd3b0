"""DMD2: few-step students by matching distributions, with a second model of the student's images.

With prediction a_T of the guided teacher and a_F of the fake, the model of the student's images,
the gradient of the KL divergence with respect to the student's image x is, up to a factor of t that
the normaliser replaces, a_F - a_T.

Sources: DMD2 (arXiv 2405.14867), Phased DMD (2510.27684), Decoupled DMD (2511.22677).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn import Parameter

from neounify.config.ranges import STRICT, AboveZero, Count, Fraction, NonNegative, Positive
from neounify.flow.path import noisy
from neounify.post_train.base import TwinState
from neounify.post_train.distill import Student, StudentConfig, checked_step
from neounify.post_train.dpo import prediction_error
from neounify.post_train.policy import NoisyImages, adopt_weights, move_towards
from neounify.post_train.prompts import PromptCase
from neounify.post_train.realism import (
    RealismHead,
    head_loss,
    real_tokens,
    student_realism_loss,
    without_gradient,
)
from neounify.post_train.rollout import STEP, noise_generator
from neounify.train.method import Finding, MicroBatch, StageContext, TrainStep
from neounify.train.optim import OptimizerConfig, OptimizerSet

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe

EPS = 1e-6


def dmd_gradient(
    image: Float[Tensor, "images ..."],
    teacher: Float[Tensor, "images ..."],
    fake: Float[Tensor, "images ..."],
    *,
    whole_batch: bool = False,
) -> Float[Tensor, "images ..."]:
    """(a_F - a_T) / mean|x - a_T|, the mean per image or over the whole batch."""
    distance = (image - teacher).abs().flatten(1).mean(1)
    if whole_batch:
        distance = distance.mean().expand_as(distance)
    shape = (-1, *[1] * (image.ndim - 1))
    return (fake - teacher) / distance.clamp(min=EPS).view(shape)


def decoupled_gradient(
    image: Tensor,
    fake: Tensor,
    teacher: Tensor,
    teacher_elsewhere: tuple[Tensor, Tensor],
    guidance: float,
) -> Tensor:
    """Decoupled DMD: (a_F - T_cond) at τ, less (g - 1)·(T_cond - T_uncond) at a later τ'.

    `teacher` is unguided at τ, `teacher_elsewhere` its (conditional, unconditional) predictions at
    τ'. Normalised as `dmd_gradient`.
    """
    cond, uncond = teacher_elsewhere
    return dmd_gradient(image, teacher + (guidance - 1) * (cond - uncond), fake)


def matching_loss(
    image: Float[Tensor, "images ..."], gradient: Float[Tensor, "images ..."]
) -> Float[Tensor, " images"]:
    """½·mean‖x - sg(x - grad)‖², whose gradient with respect to x is grad over the values."""
    target = (image - gradient).detach()
    return (image - target).flatten(1).square().mean(1) / 2


def renoise(
    state: Tensor, noise: Tensor, tau: float | Tensor, t: float | Tensor, sigma: float
) -> Tensor:
    """z_τ = α·z' + γ·ε of a student's state z' at t' > τ: the noise that is missing is added."""
    alpha, gamma = renoise_factors(tau, t, sigma)
    return alpha * state + gamma * noise


def renoise_factors(
    tau: float | Tensor, t: float | Tensor, sigma: float
) -> tuple[float | Tensor, float | Tensor]:
    """α = τ/t' and γ with γ² = σ²·((1 - τ)² - α²·(1 - t')²)."""
    alpha = tau / t
    square = (1 - tau) ** 2 - (alpha * (1 - t)) ** 2
    return alpha, sigma * (square.sqrt() if isinstance(square, Tensor) else math.sqrt(square))


def sub_interval_target(
    state: Tensor, noise: Tensor, tau: float | Tensor, t: float | Tensor, sigma: float
) -> tuple[Tensor, float | Tensor]:
    """Target x* of the fake at z_τ when the student stops at t' < 1, and its weight γ²/σ².

    x* = z'/t' - (σ²·τ·s'²/(t'²·γ))·ε with s' = 1 - t'; E[x* | z_τ] = E[x | z_τ], which z'/t' alone
    does not have. Its variance grows as 1/γ² when τ approaches t', hence the weight.
    """
    _, gamma = renoise_factors(tau, t, sigma)
    target = state / t - (sigma**2 * tau * (1 - t) ** 2 / (t**2 * gamma)) * noise
    return target, gamma**2 / sigma**2


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Dmd2Config(StudentConfig):
    """DMD2, `kind = "dmd2"`.

    The fake starts from the weights of the teacher, and trains what the student does. After each
    step of the student it takes `fake_steps` R with `fake_optimizer`; all are steps of the stage.
    `min_tau` and `max_tau` bound the times that images are noised to. `sub_intervals` matches the
    student's next state in place of x̂ (Phased DMD). `ida`: F ← (1 - ida)·F + ida·G after each step
    of the student (SenseFlow, arXiv 2506.00523). `decoupled` guides at a separate time (Decoupled
    DMD). With `gan` above 0 (published 5e-3) a head on the fake's states tells the student's images
    from real ones, which the prompts must have; `gan` and `gan_fake` weigh its losses of student
    and fake.
    """

    kind: Literal["dmd2"] = "dmd2"
    fake_steps: Count = 5
    fake_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=4e-7)
    )
    fake_clip: Positive = 1.0
    min_tau: AboveZero = 0.02
    max_tau: AboveZero = 0.98
    sub_intervals: bool = False
    ida: Fraction = 0.0
    decoupled: bool = False
    gan: NonNegative = 0.0
    gan_fake: NonNegative = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_tau < self.max_tau < 1:
            raise ValueError(f"min_tau and max_tau must be 0 < {self.min_tau} < {self.max_tau} < 1")
        if self.gan and self.prompts.kind == "text":
            raise ValueError(
                "gan needs real images: prompts of scenes, or of JSON lines that name an image"
            )
        if self.sub_intervals and self.decoupled:
            raise ValueError("sub_intervals and decoupled exclude one another")

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError where IDA would average adapters of different weights."""
        super().check_stage(stage)
        if self.ida and stage.lora is not None and self.teacher_checkpoint is not None:
            raise ValueError(
                "ida averages the weights of student and fake; with lora and teacher_checkpoint "
                "both have other weights below their adapters: leave ida out, or train weights"
            )

    def build(self, context: StageContext) -> Dmd2:
        return Dmd2(self, context)

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.post_train.doctor import examine_turns

        return examine_turns(context, self, 2 * (self.fake_steps + 1))


@dataclass(frozen=True, eq=False)
class DmdContent:
    """A micro-batch: cases by image size, and the images of the whole step."""

    groups: Sequence[tuple[int, Sequence[PromptCase]]]
    step_images: int


class Dmd2(Student):
    """Student and fake in turn: one step of the student, then `fake_steps` of the fake."""

    config: Dmd2Config

    def __init__(self, config: Dmd2Config, context: StageContext) -> None:
        super().__init__(config, context)
        self.fake = self.keep(TwinState("fake", self.model, trained=True))
        adopt_weights(self.fake.model, self.teacher.model)
        self.head: RealismHead | None = None
        if config.gan:
            head = RealismHead(self.model.config.hidden_size, context.recipe.seed)
            self.head = self.keep(head.to(self.model.device))
        assert config.student.steps is not None
        self.student_steps = config.student.steps

    def is_students_turn(self, stage_step: int) -> bool:
        return stage_step % (self.config.fake_steps + 1) == 0

    def optimizers(self) -> list[OptimizerSet]:
        stage = self.context.stage
        schedule = stage.schedule.over(stage.steps)
        student = OptimizerSet(
            dict(self.model.named_parameters()),
            stage.optimizer,
            clip=stage.clip,
            schedule=schedule,
            active=self.is_students_turn,
        )
        fake = OptimizerSet(
            self.second_parameters(),
            self.config.fake_optimizer,
            clip=self.config.fake_clip,
            schedule=schedule,
            active=lambda step: not self.is_students_turn(step),
            prefix="fake.",
        )
        return [student, fake]

    def second_parameters(self) -> dict[str, Parameter]:
        """Parameters of the fake and of its GAN head."""
        head = {} if self.head is None else dict(self.head.named_parameters())
        return {**self.fake.parameters(), **{f"head.{name}": p for name, p in head.items()}}

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        step = 0 if position is None else checked_step(position)
        parts, count = self.context.stage.packs_per_step, self.config.prompts_per_step
        while True:
            ranks = self.context.ranks
            for part in range(ranks.rank, parts, ranks.size):
                first = step * count + part * count // parts
                stop = step * count + (part + 1) * count // parts
                groups = list(enumerate(self.cases(first, stop - first)))
                yield MicroBatch(
                    content=DmdContent(groups, count),
                    position=step + (part + 1 == parts),
                    samples=[f"prompt {number}" for number in range(first, stop)],
                    images=stop - first,
                    tokens=0,
                    cost=stop - first,
                )
            step += 1

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        content: DmdContent = batch.content
        students = self.is_students_turn(step.stage_step)
        generator = torch.Generator().manual_seed(step.batch_seed())
        # One k for the whole step.
        drawn = noise_generator(self.config.seed, step.number, STEP, 0)
        k = int(torch.randint(self.student_steps, (), generator=drawn))
        total = torch.zeros((), device=self.model.device)
        for place, cases in content.groups:
            turn = _Turn(self, cases, step, place, k, generator)
            loss = turn.student_loss() if students else turn.fake_loss()
            name = "loss" if students else "loss/fake"
            for key in (name, f"{name}/step{k}"):
                self.metrics.add(key, float(loss.detach().mean()), len(loss))
            total = total + loss.sum()
        return total / content.step_images

    def end_step(self, step: TrainStep, taken: bool) -> None:
        if taken and self.config.ida and self.is_students_turn(step.stage_step):
            move_towards(self.model, self.fake.model, 1 - self.config.ida)
        super().end_step(step, taken)


class _Turn:
    """The images of one micro-batch and size: backward simulation, and both losses."""

    def __init__(
        self,
        method: Dmd2,
        cases: Sequence[PromptCase],
        step: TrainStep,
        place: int,
        k: int,
        generator: torch.Generator,
    ) -> None:
        self.method, self.config, self.generator = method, method.config, generator
        student, guided = method.sampling(cases)
        self.guidance, self.times = guided.guidance, student.times()
        self.grid, self.prefixes = method.prefixes(cases, guided)
        conditions = [p["cond"] for p in self.prefixes]
        self.images = NoisyImages(method.model, self.grid, conditions, method.attention)
        self.z = method.noise(step.number, place, len(cases), self.grid, step.pack)
        self.k, self.cases = k, cases

    def generated(self) -> tuple[Tensor, float]:
        """The student's image behind k steps without gradient, and the t it belongs to.

        That is x̂ and 1; with sub-intervals the next state and its time.
        """
        model, z = self.method.model, self.z
        with torch.no_grad():
            for t, t_next in pairwise(self.times[: self.k + 1]):
                z = z + (t_next - t) * (self._clean(model, z, t) - z) / (1 - t)
        t, t_next = self.times[self.k], self.times[self.k + 1]
        clean = self._clean(model, z, t)
        if not self.config.sub_intervals or t_next >= 1:
            return clean, 1.0
        return z + (t_next - t) * (clean - z) / (1 - t), t_next

    def student_loss(self) -> Float[Tensor, " images"]:
        """`matching_loss` with the gradient of teacher and fake at a random τ."""
        image, end = self.generated()
        method = self.method
        with torch.no_grad():
            tau, noise = self._drawn(end)
            z = self._noised(image, noise, tau, end)
            fake = self.images.clean(method.fake.model, z, tau)
            if self.config.decoupled:
                gradient = self._decoupled(image, fake, z, tau)
            else:
                gradient = dmd_gradient(image, self._teacher(z, tau), fake)
            method.metrics.add("log_gradient", float(gradient.abs().mean().clamp(min=1e-12).log()))
        loss = matching_loss(image, gradient)
        if method.head is None:
            return loss
        return loss + self.config.gan * self._realism(self._noised(image, noise, tau, end), tau)

    def _realism(self, z: Tensor, tau: Tensor) -> Float[Tensor, " images"]:
        """The head's loss of the student's images with noise, whose gradient reaches them alone."""
        method = self.method
        assert method.head is not None
        with without_gradient(method.second_parameters().values()):
            logits = method.head(self.images.clean_and_states(method.fake.model, z, tau)[1])
        loss = student_realism_loss(logits)
        method.metrics.add("gan/student", float(loss.detach().mean()), len(tau))
        return loss

    def fake_loss(self) -> Float[Tensor, " images"]:
        """The training loss of the fake on the student's images, and that of its head."""
        with torch.no_grad():
            image, end = self.generated()
            tau, noise = self._drawn(end)
            z = self._noised(image, noise, tau, end)
        clean, states = self.images.clean_and_states(self.method.fake.model, z, tau)
        loss = self._fake_error(clean, image, noise, tau, end)
        if self.method.head is None:
            return loss
        return loss + self.config.gan_fake * self._head_loss(self.method.head, states, tau)

    def _head_loss(self, head: RealismHead, states: Tensor, tau: Tensor) -> Tensor:
        """The head's loss of the student's images and of real ones, noised to the same τ."""
        method = self.method
        real = real_tokens(self.cases, method.model.config.token_size, tau.device)
        noise = torch.randn(real.shape, generator=self.generator).to(tau.device)
        z = noisy(real, noise, tau.view(-1, 1, 1), self.images.sigma)
        wanted = head(self.images.clean_and_states(method.fake.model, z, tau)[1])
        generated = head(states)
        right = torch.cat([generated < 0, wanted > 0]).float().mean()
        loss = head_loss(wanted, generated)
        method.metrics.add("gan/fake", float(loss.detach().mean()), len(tau))
        method.metrics.add("gan/accuracy", float(right), len(tau))
        return loss

    def _fake_error(
        self, clean: Tensor, image: Tensor, noise: Tensor, tau: Tensor, end: float
    ) -> Float[Tensor, " images"]:
        """The training loss of the fake's x̂ of the student's images with noise."""
        if end >= 1:
            return prediction_error(clean, image, tau)
        target, weight = sub_interval_target(
            image, noise, tau.view(-1, 1, 1), end, self.images.sigma
        )
        weights = torch.as_tensor(weight, device=clean.device).flatten()
        return (clean - target).square().flatten(1).mean(1) * weights

    def _decoupled(self, image: Tensor, fake: Tensor, z: Tensor, tau: Tensor) -> Tensor:
        method, guidance = self.method, self.guidance
        plain = self.images.clean(method.teacher.model, z, tau)
        if len(guidance.branches()) == 1:
            return dmd_gradient(image, plain, fake)
        low = self.times[self.k]
        u = torch.rand(len(tau), generator=self.generator).to(tau.device)
        later = low + (self.config.max_tau - low) * u if low < self.config.max_tau else tau
        noise = torch.randn(image.shape, generator=self.generator).to(image.device)
        there = noisy(image.detach(), noise, later.view(-1, 1, 1), self.images.sigma)
        cond = self.images.clean(method.teacher.model, there, later)
        other = NoisyImages(
            method.model,
            self.grid,
            [p[guidance.branches()[1]] for p in self.prefixes],
            method.attention,
        )
        uncond = other.clean(method.teacher.model, there, later)
        return decoupled_gradient(image, fake, plain, (cond, uncond), guidance.text)

    def _teacher(self, z: Tensor, tau: Tensor) -> Tensor:
        guided = self.method.guided(self.grid, self.prefixes, self.guidance)
        return guided.clean(self.method.teacher.model, z, tau)

    def _clean(self, model: Any, z: Tensor, t: float) -> Tensor:
        return self.images.clean(model, z, torch.full((z.shape[0],), t, device=z.device))

    def _drawn(self, end: float) -> tuple[Tensor, Tensor]:
        """τ of each image, below `end`, and ε."""
        count = self.z.shape[0]
        low = self.config.min_tau
        high = min(self.config.max_tau, end * 0.98)
        low = min(low, high / 2)
        u = torch.rand(count, generator=self.generator)
        noise = torch.randn(self.z.shape, generator=self.generator)
        return (low + (high - low) * u).to(self.z.device), noise.to(self.z.device)

    def _noised(self, image: Tensor, noise: Tensor, tau: Tensor, end: float) -> Tensor:
        times = tau.view(-1, 1, 1)
        if end >= 1:
            return noisy(image, noise, times, self.images.sigma)
        return renoise(image, noise, times, end, self.images.sigma)
