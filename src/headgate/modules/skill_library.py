"""SkillLibrary: what skills look like to the bare model, and which expert serves each, so that a skill can be recognised.

Prototypes are kept uncentred, as an exponential moving average (rate .05 for a new look); the reference mean is
subtracted where similarities are taken. When a skill enters, the similarities between random halves of its samples
are kept: how alike two looks at it are is what its calibrated threshold rests on. ``usual_K`` is how unlike its prototype
a single document of a skill may be: the least alike of those first seen, with half as much room again below it as lies
between it and their median. (The minimum, since what is rare in a skill, one document in forty say, often lies apart,
where a small quantile falls now on one side, now on the other.) With a contrast, every similarity
is taken between projections of a head that is trained anew with every skill that enters.

An expert may serve several skills, each with a prototype of its own.

Shapes: K skills in the library, H width, N samples given, R repetitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.errors import ConfigError
from headgate.modules.contrastive_head import SkillContrast
from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure
from headgate.ops import novelty
from headgate.ops.randomness import generator

REPEATS = 200
BUFFERS = ("expert_ids", "keys_K", "prototypes_KH", "halves_KR", "samples_K", "usual_K")


class SkillLibrary(FixedPrecision):
    """Prototypes by skill; grows and shrinks. All state is in buffers, fp32 whatever the model's type; names are JSON.

    A skill's key is never used twice. ``names``: of labelled skills, None of others.

    Args:
        width: H. decay: of the prototypes. seed: of the draws of halves.
        contrast: steps of training of the projection head at every new skill; 0: cosines of the means themselves.
    """

    expert_ids: Tensor
    keys_K: Tensor
    prototypes_KH: Tensor
    halves_KR: Tensor
    samples_K: Tensor
    usual_K: Tensor
    reference_H: Tensor
    has_reference: Tensor

    def __init__(self, width: int, *, decay: float = 0.95, seed: int = 0, contrast: int = 0) -> None:
        super().__init__()
        self.width, self.decay, self.seed = width, decay, seed
        self.contrast = SkillContrast(width, contrast, seed=seed) if contrast else None
        self.register_buffer("reference_H", torch.zeros(width))
        self.register_buffer("has_reference", torch.zeros((), dtype=torch.bool))
        self.names: list[str | None] = []
        self.next_key = 0
        self._allocate(0)

    def _allocate(self, count: int) -> None:
        device = self.reference_H.device
        self.register_buffer("expert_ids", torch.zeros(count, dtype=torch.long, device=device))
        self.register_buffer("keys_K", torch.zeros(count, dtype=torch.long, device=device))
        self.register_buffer("prototypes_KH", torch.zeros(count, self.width, device=device))
        self.register_buffer("halves_KR", torch.zeros(count, REPEATS, device=device))
        self.register_buffer("samples_K", torch.zeros(count, device=device))
        self.register_buffer("usual_K", torch.zeros(count, device=device))

    # -- contents ---------------------------------------------------------------------------------------
    @property
    def experts(self) -> list[int]:
        """The expert of each skill, by number."""
        return [int(expert) for expert in self.expert_ids]

    @property
    def keys(self) -> list[int]:
        return [int(key) for key in self.keys_K]

    def keys_of(self, expert: int) -> list[int]:
        """The skills that an expert serves."""
        return [key for key, owner in zip(self.keys, self.experts, strict=True) if owner == expert]

    def key_of(self, name: str) -> int | None:
        return self.keys[self.names.index(name)] if name in self.names else None

    def add(self, expert: int, embeddings_NH: Tensor, tokens_N: Tensor, name: str | None = None) -> int:
        """Enter a skill that the expert serves; its key. Raises ConfigError for a name twice or fewer than two samples."""
        if name is not None and name in self.names:
            raise ConfigError(f"skill {name!r} is in the library already: update it")
        if len(embeddings_NH) < 2:
            raise ConfigError(f"expert {expert}: a skill needs two samples or more, got {len(embeddings_NH)}")
        key, self.next_key = self.next_key, self.next_key + 1
        stream = generator(self.seed, key, "skill_library.halves")
        first_RH, second_RH = novelty.split_half_means(embeddings_NH.float(), tokens_N, REPEATS, stream)
        reference_H = self.reference_H.to(first_RH.device)
        prototype_1H = novelty.token_mean(embeddings_NH.float(), tokens_N)[None]
        own_N = novelty.cosines(embeddings_NH.float(), prototype_1H, reference_H)[:, 0]
        new = (
            torch.tensor([expert]),
            torch.tensor([key]),
            prototype_1H,
            novelty.paired_cosines(first_RH, second_RH, reference_H)[None],
            torch.tensor([float(len(tokens_N))]),
            (own_N.min() - (own_N.median() - own_N.min()) / 2)[None],
        )
        for buffer, value in zip(BUFFERS, new, strict=True):
            old = getattr(self, buffer)
            setattr(self, buffer, torch.cat([old, value.to(old)]))
        self.names.append(name)
        if self.contrast is not None:
            self.contrast.add(key, embeddings_NH.float() - reference_H)
            self._learn_contrast()
        return key

    def _learn_contrast(self) -> None:
        """Train the head anew and take every skill's likeness to itself with it."""
        contrast = self.contrast
        assert contrast is not None
        contrast.train_anew()
        for place, key in enumerate(self.keys):
            samples_NH = contrast.of(key).cpu()
            stream = generator(self.seed, key, "skill_library.halves")
            halves = novelty.split_half_means(samples_NH, torch.ones(len(samples_NH)), REPEATS, stream)
            first_RP, second_RP = (contrast.head(half.to(self.reference_H)) for half in halves)
            self.halves_KR[place] = (first_RP * second_RP).sum(-1)

    def update(self, expert: int, embeddings_NH: Tensor, tokens_N: Tensor, key: int | None = None) -> int:
        """Another look at a skill that the expert serves: its prototype moves by 1 - decay. Returns its key.

        ``key`` None: of the expert's skills, the one that is most like the look.
        """
        self._check(expert)
        look_H = novelty.token_mean(embeddings_NH.float(), tokens_N).to(self.prototypes_KH)
        if key is None:
            likeness = self._cosines(look_H).tolist()
            key = max(self.keys_of(expert), key=lambda one: likeness[self.keys.index(one)])
        self.prototypes_KH[self.keys.index(key)].lerp_(look_H, 1 - self.decay)
        return key

    def remove(self, expert: int) -> None:
        """Forget the skills of an expert that goes; the others keep their keys."""
        self._check(expert)
        kept = [place for place, owner in enumerate(self.experts) if owner != expert]
        gone = self.keys_of(expert)
        for buffer in BUFFERS:
            setattr(self, buffer, getattr(self, buffer)[kept])
        self.names = [self.names[place] for place in kept]
        if self.contrast is not None:
            for key in gone:
                self.contrast.remove(key)

    def give(self, expert: int, heir: int) -> None:
        """The skills of one expert are served by another from now on."""
        self.expert_ids[self.expert_ids == expert] = heir

    def set_reference(self, reference_H: Tensor, mix_NH: Tensor | None = None) -> None:
        """The mean hidden state that no skill is credited with (see probe.reference_text), once for all skills.

        ``mix_NH`` are the documents that it is the mean of: a contrast needs them. Raises ConfigError without.
        """
        if self.experts:
            raise ConfigError(
                "the reference is set before the first skill enters: similarities hold against it"
            )
        self.reference_H.copy_(reference_H)
        self.has_reference.fill_(True)
        if self.contrast is not None:
            if mix_NH is None:
                raise ConfigError("a contrast needs the documents of the reference: give mix_NH too")
            self.contrast.add(SkillContrast.MIX, mix_NH.float() - reference_H)

    def _check(self, expert: int) -> None:
        if expert not in self.experts:
            raise ConfigError(f"expert {expert} is not in the library: it holds {self.experts}")

    # -- similarity -------------------------------------------------------------------------------------
    def similarities(self, embeddings_NH: Tensor, tokens_N: Tensor) -> Tensor:
        """``[K]`` cosine of the samples' token mean with every prototype."""
        look_H = novelty.token_mean(embeddings_NH.float(), tokens_N)
        return self._cosines(look_H.to(self.reference_H))

    def _cosines(self, means_xH: Tensor) -> Tensor:
        """``[..., K]`` of means with the prototypes, as they are or as the head projects them."""
        if self.contrast is None:
            return novelty.cosines(means_xH, self.prototypes_KH, self.reference_H)
        return self.contrast.similarities(means_xH - self.reference_H, self.prototypes_KH - self.reference_H)

    def bootstrap_similarities(
        self, embeddings_NH: Tensor, tokens_N: Tensor, stream: torch.Generator
    ) -> Tensor:
        """``[R, K]``: the same for samples drawn with replacement."""
        looks_RH = novelty.bootstrap_means(embeddings_NH.float(), tokens_N, REPEATS, stream)
        return self._cosines(looks_RH.to(self.reference_H))

    def calibrated_thresholds(self, false_spawns: float, samples: int) -> Tensor:
        """``[K]``: one threshold per skill for a look of so many samples, from how alike halves of its skill are
        and how unlike the others'.

        Skills differ in spread: a threshold that fits a diverse one lets neighbours of a narrow one pass.
        """
        between_KK = self._cosines(self.prototypes_KH)
        found = []
        for place, known in enumerate(self.samples_K.tolist()):
            look = min(samples, known)  # a longer look cannot undo the chance in the prototype
            within_R = novelty.rescaled_similarity(self.halves_KR[place], known / 2, (look, known))
            others = [v for i, v in enumerate(between_KK[place].tolist()) if i != place]
            found.append(novelty.calibrated_threshold(within_R, others, false_spawns))
        return torch.tensor(found)

    # -- saving -----------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        contrast = None if self.contrast is None else self.contrast.structure()
        facts = {"names": list(self.names), "next_key": self.next_key}
        return {"width": self.width, "skills": len(self.keys), **facts, "contrast": contrast}

    def restore(self, structure: Structure) -> None:
        """Room for the saved skills, before a strict load."""
        if structure["width"] != self.width:
            raise ConfigError(
                f"the saved library has width {structure['width']}, this model {self.width}: load it into its own model"
            )
        self._allocate(structure["skills"])
        self.names, self.next_key = list(structure["names"]), structure["next_key"]
        if self.contrast is not None:
            self.contrast.restore(structure["contrast"])
