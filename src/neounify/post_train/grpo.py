"""Flow-GRPO: policy gradients over the random steps of a sampler.

The ratio of two policies is that of means over the D values of an image, the true one to the power
1/D, so clip ranges are tiny: 1e-4 to 4e-6.

Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (2510.22319), Flow-DPPO (2606.11025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.config.ranges import STRICT, Count, NonNegative, Positive
from neounify.errors import ConfigError
from neounify.flow.guidance import Branch
from neounify.flow.sde import GaussianStep, StepKind, check_step_kind
from neounify.model.parts import GEN, UND, StreamName
from neounify.post_train.advantage import clipped_objective
from neounify.post_train.answers import (
    Answers,
    restored_answers,
    rollout_seed,
    sample_answers,
    thought_prefixes,
    thought_prompts,
)
from neounify.post_train.image_groups import ImageGroupConfig, ImageGroupMethod
from neounify.post_train.iteration import Iteration, Share
from neounify.post_train.policy import Prefixes, TokenPrompt
from neounify.post_train.prompts import STORY, PromptCase
from neounify.post_train.rollout import (
    THOUGHTS,
    ImageRollout,
    RandomSteps,
    image_request,
    noise_generator,
)
from neounify.post_train.text_grpo import TokenObjective, log_length, save_texts
from neounify.train.method import StageContext, TrainStep

WINDOW_DRAW = 2
"""Purpose of the random numbers that choose a window."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyTerms:
    """Loss of a random step of some images, and what of it is logged; all [images].

    `log_ratio` is ℓ_θ - ℓ_old, with the guard its guarded form; `divergence` is b between both.
    """

    loss: Tensor
    log_ratio: Tensor
    divergence: Tensor
    clipped: Tensor
    """Whether the clip range or the KL mask took the image's gradient away, bool."""


def policy_terms(
    step: GaussianStep,
    clean: Float[Tensor, "images ..."],
    old: Float[Tensor, "images ..."],
    noise: Float[Tensor, "images ..."],
    advantage: Float[Tensor, " images"],
    *,
    clip: float,
    guard: bool = False,
    kl_mask: float | None = None,
) -> PolicyTerms:
    """max(-Aρ, -A·clip(ρ, 1 - c, 1 + c)) with ρ = exp(ℓ_θ - ℓ_old).

    `clean` is x̂ of the policy, `old` of the one that sampled with `noise`, both behind z of the
    step. `guard` takes ρ = exp((ℓ_θ - ℓ_old + b)·w/σ), whose mean is 1 and whose spread is the
    same in all steps. With `kl_mask` δ the clip is replaced by Flow-DPPO's rule: an image is left
    out once b > δ and the update moves it further away (A > 0 and ρ > 1, or A < 0 and ρ < 1).
    """
    measure = step.guarded_log_ratio if guard else step.log_ratio
    log_ratio = measure(noise, clean, old)
    divergence = step.divergence(clean, old)
    ratio = log_ratio.exp()
    if kl_mask is None:
        loss, clipped = clipped_objective(ratio, advantage, clip)
    else:
        unclipped = -advantage * ratio
        moves_away = torch.where(advantage > 0, ratio > 1, ratio < 1)
        clipped = moves_away & (divergence > kl_mask) & (advantage != 0)
        loss = torch.where(clipped, unclipped.detach(), unclipped)
    return PolicyTerms(
        loss=loss,
        log_ratio=log_ratio.detach(),
        divergence=divergence.detach(),
        clipped=clipped,
    )


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class FlowGrpoConfig(ImageGroupConfig):
    """Flow-GRPO, `kind = "flow-grpo"`.

    `step_kind` and `eta` are of the random steps (`flow.sde`), which stand in a window of `window`
    steps, by default all but the last. `window_start` "random" draws it anew in each iteration, in
    the first half of the steps; "sliding" moves it by one step every `window_every` iterations;
    "first" leaves it at the beginning. `clip` is c, `guard` GRPO-Guard's ratio, with
    `divide_by_time` a step's loss over its t' - t, `kl_mask` δ of Flow-DPPO in place of the clip,
    `kl` β of the divergence from the weights at the start.
    `noise_per_group` starts a group from one noise, so that its images differ by the window alone.

    With `think` each image follows its thought, which is at most `max_think_tokens` long. Thought
    and image share one advantage: the loss is that of the image and `thought_weight` times that of
    `text-grpo` with `thought_clip` and `thought_kl`. Both streams are trained, the understanding
    stream by its thoughts alone: keys and values of prompts and thoughts are constants within an
    update, computed anew before each.
    """

    rollout_settings: ClassVar[tuple[str, ...]] = (
        *ImageGroupConfig.rollout_settings,
        *("step_kind", "eta", "window", "window_start", "window_every", "noise_per_group"),
        *("think", "max_think_tokens"),
    )

    kind: Literal["flow-grpo"] = "flow-grpo"
    step_kind: StepKind = "cps"
    eta: float = 0.7
    window: Count | None = None
    window_start: Literal["random", "sliding", "first"] = "random"
    window_every: Count = 25
    clip: Positive = 1e-4
    guard: bool = False
    divide_by_time: bool = False
    kl_mask: Positive | None = None
    kl: NonNegative = 0.0
    noise_per_group: bool = False
    think: bool = False
    max_think_tokens: Count = 128
    thought_weight: NonNegative = 1.0
    thought_clip: Positive = 0.2
    thought_kl: NonNegative = 0.0

    @property
    def streams(self) -> tuple[StreamName, ...]:
        return (UND, GEN) if self.think else (GEN,)

    def __post_init__(self) -> None:
        check_step_kind(self.step_kind, self.eta)
        if self.step_kind == "ode" or self.eta == 0:
            raise ValueError(
                "flow-grpo needs random steps: another step_kind than ode, eta above 0"
            )
        if self.divide_by_time and not self.guard:
            raise ValueError("divide_by_time belongs to guard = true: set it too, or leave it out")
        steps = self.sampler.steps
        if steps is not None and steps < 2:
            raise ValueError("sampler.steps must be at least 2: the last step is never random")
        if steps is not None and self.window is not None and self.window >= steps:
            raise ValueError(
                f"window must be at most {steps - 1} of {steps} steps (the last is never random), "
                f"got {self.window}"
            )
        self.sampler.check_unguided("sampler")
        if self.think and STORY in (self.prompts.categories or ()):
            raise ValueError(
                "think: images of a story follow no thought; leave story out of "
                "prompts.categories, or think = false"
            )

    def build(self, context: StageContext) -> FlowGrpo:
        return FlowGrpo(self, context)


class FlowGrpo(ImageGroupMethod):
    """The mean over the window's steps of `policy_terms`, and β times the divergence."""

    config: FlowGrpoConfig

    def __init__(self, config: FlowGrpoConfig, context: StageContext) -> None:
        super().__init__(config, context)
        needed = config.kl or (config.think and config.thought_kl)
        self.reference = self.reference_copy(bool(needed))
        self.thoughts = TokenObjective(
            metrics=self.metrics, clip=config.thought_clip, kl=config.thought_kl, prefix="thought/"
        )
        steps = config.sampler.steps or self.model.config.sampling.steps
        if (config.window or 1) >= steps:
            raise ConfigError(
                f"method.window must be at most {steps - 1} of the checkpoint's {steps} steps, got "
                f"{config.window}"
            )
        self.steps = steps

    def random_steps(self, iteration: int) -> RandomSteps:
        config = self.config
        return RandomSteps(
            kind=config.step_kind,
            eta=config.eta,
            window=self.window(iteration),
            noise_per_group=config.noise_per_group,
        )

    def window(self, iteration: int) -> range:
        """The random steps of an iteration."""
        config, last = self.config, self.steps - 1
        if config.window is None:
            return range(last)
        if config.window_start == "first":
            start = 0
        elif config.window_start == "sliding":
            start = iteration // config.window_every % (last - config.window + 1)
        else:
            starts = max(1, min(self.steps // 2, last) - config.window + 1)
            generator = noise_generator(config.seed, iteration, WINDOW_DRAW, 0)
            start = int(torch.randint(starts, (), generator=generator))
        return range(start, start + config.window)

    # --- thoughts ---

    def rollout(
        self,
        cases: Sequence[PromptCase],
        number: int,
        index: int,
        prefixes: Sequence[Prefixes] | None = None,
    ) -> ImageRollout:
        if not self.config.think:
            return super().rollout(cases, number, index, prefixes)
        config = self.config
        thoughts = sample_answers(
            self.model,
            self.processor,
            cases,
            self._thought_prompts(cases),
            config.group,
            config.max_think_tokens,
            think=True,
            thoughts_only=True,
            seed=rollout_seed(config.seed, index),
            iteration=number,
        )
        images = super().rollout(cases, number, index, self._prefixes(thoughts))
        return replace(images, thoughts=thoughts)

    def restored(
        self,
        cases: Sequence[PromptCase],
        number: int,
        tensors: Mapping[str, Tensor],
        prefixes: Sequence[Prefixes] | None = None,
    ) -> ImageRollout:
        if not self.config.think:
            return super().restored(cases, number, tensors, prefixes)
        of_thoughts = {n[len(THOUGHTS) :]: t for n, t in tensors.items() if n.startswith(THOUGHTS)}
        of_images = {n: t for n, t in tensors.items() if not n.startswith(THOUGHTS)}
        thoughts = restored_answers(
            cases, self._thought_prompts(cases), self.config.group, of_thoughts, self.model.device
        )
        images = super().restored(cases, number, of_images, self._prefixes(thoughts))
        return replace(images, thoughts=thoughts)

    def measure(self, rollout: ImageRollout) -> None:
        if rollout.thoughts is not None:
            log_length(self.metrics, rollout.thoughts, "thought/")

    def begin_update(
        self, iteration: Iteration[ImageRollout], update: int
    ) -> Iteration[ImageRollout]:
        """Read prompts and thoughts anew, where an update has changed the understanding stream."""
        if not update or not self.config.think:
            return iteration
        rollouts = [
            rollout
            if rollout.thoughts is None
            else replace(rollout, prefixes=self._prefixes(rollout.thoughts))
            for rollout in iteration.rollouts
        ]
        return replace(iteration, rollouts=rollouts)

    def _thought_prompts(self, cases: Sequence[PromptCase]) -> list[TokenPrompt]:
        sampling = self.resolve(self.config.sampler, cases)
        requests = [image_request(case, sampling) for case in cases]
        return thought_prompts(self.model, self.processor, requests)

    def _prefixes(self, thoughts: Answers) -> list[dict[Branch, SequenceCache]]:
        return thought_prefixes(self.model, self.processor, thoughts)

    def save_sheet(self, iteration: Iteration[ImageRollout], index: int) -> None:
        super().save_sheet(iteration, index)
        thoughts = iteration.rollouts[index].thoughts
        if thoughts is not None:
            save_texts(self, self.processor, iteration, index, thoughts)

    # --- loss ---

    def share_loss(self, share: Share[ImageRollout], step: TrainStep) -> Float[Tensor, " n"]:
        loss = self._image_loss(share, step)
        thoughts, config = share.rollout.thoughts, self.config
        if thoughts is None or not config.thought_weight:
            return loss
        reference = self.reference.model if self.reference and config.thought_kl else None
        return loss + config.thought_weight * self.thoughts.loss(
            self.model, thoughts, share.chosen.tolist(), share.advantages, reference
        )

    def _image_loss(self, share: Share[ImageRollout], step: TrainStep) -> Float[Tensor, " n"]:
        config, rollout, chosen = self.config, share.rollout, share.chosen
        noisy = self.noisy_images(share)
        total = torch.zeros(len(chosen), device=self.model.device)
        for k, taken in rollout.random.items():
            z, noise = taken.z[chosen], taken.noise[chosen]
            t = torch.full((len(chosen),), rollout.times[k], device=self.model.device)
            clean = noisy.clean(self.model, z, t)
            if step.batches[step.index].content.update == 0:
                # The same values, in the precision and the batches of the update.
                taken.clean[chosen] = clean.detach()
            old = taken.clean[chosen]
            terms = policy_terms(
                rollout.steps[k],
                clean,
                old,
                noise,
                share.advantages,
                clip=config.clip,
                guard=config.guard,
                kl_mask=config.kl_mask,
            )
            time = rollout.times[k + 1] - rollout.times[k] if config.divide_by_time else 1.0
            total = total + terms.loss / time
            self._measure(k, terms, old.shape[1:].numel())
            if self.reference is not None and config.kl:
                with torch.no_grad():
                    there = noisy.clean(self.reference.model, z, t)
                divergence = rollout.steps[k].divergence(clean, there)
                self.metrics.add("kl_reference", float(divergence.mean().detach()), len(chosen))
                total = total + config.kl * divergence
        return total / len(rollout.random)

    def _measure(self, k: int, terms: PolicyTerms, values: int) -> None:
        """Log D·b in nats, √(2b/D), the clipped share and the ratio, in all and for step k."""
        count = len(terms.loss)
        b = float(terms.divergence.mean())
        for end in ("", f"/step{k}"):
            self.metrics.add(f"kl{end}", b * values, count)
            self.metrics.add(f"ratio_spread{end}", math.sqrt(2 * b / values), count)
            self.metrics.add(f"clipped{end}", float(terms.clipped.float().mean()), count)
            self.metrics.add(f"ratio{end}", float(terms.log_ratio.exp().mean()), count)

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> Sequence[str]:
        messages = [*super().warnings(stage_step, report), *self.thoughts.warnings(report)]
        if self.config.updates == 1 and abs(report.get("ratio", 1.0) - 1) > 1e-6:
            messages.append(
                f"the ratio is {report['ratio']:.8f} in the only update of an iteration, not 1: "
                'other values are computed than when sampling; use precision = "float32"'
            )
        return messages
