"""ExpertSet: the experts of a model, their factors at every site, their router rows, and what each has been through.

Nothing here changes what the model computes at that moment, except eviction and merging, which say so. Both check all
that they need before they write anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from headgate.errors import ConfigError
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.roster import ExpertInfo, Roster
from headgate.methods.lora_experts.routers import RouterSet
from headgate.methods.lora_experts.targets import is_target
from headgate.modules.expert_bank import ExpertBank
from headgate.modules.low_rank_expert import LowRankExpert
from headgate.modules.structure import Structure
from headgate.ops.expert_merging import Factors
from headgate.ops.randomness import generator

Sizes = Mapping[str, Sequence[int]]


class ExpertSet(nn.Module):
    """``roster``: who there is. ``banks``: a bank per site. ``routers``: their rows. ``current``: who trains.

    ``on_removal`` is called with an expert that goes and the one that takes over from it (None: nobody does), so that
    whoever keeps something by expert keeps up.
    """

    def __init__(self, config: LoraExpertsConfig) -> None:
        super().__init__()
        self.config, self.seed, self.hidden_size = config, 0, 0
        self.roster = Roster()
        self.banks = nn.ModuleDict()
        self.routers = RouterSet(config)
        self.current = 0
        self.on_removal: Callable[[int, int | None], None] = lambda number, heir: None

    def build(self, sizes: Sizes, hidden_size: int, seed: int) -> None:
        """Room for experts on linears of these sizes; no expert yet. Raises ConfigError for a site that is not there."""
        config, self.hidden_size, self.seed = self.config, hidden_size, seed
        for site, (in_features, out_features) in sizes.items():
            self.banks[site] = ExpertBank(in_features, out_features)
        self.routers.build(sizes, hidden_size)
        if config.freeze_first:
            self.sites_named(config.freeze_first)

    # -- what there is ----------------------------------------------------------------------------------
    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width in and out of every site's linear."""
        return {site: (self.bank(site).in_features, self.bank(site).out_features) for site in self.banks}

    def bank(self, site: str) -> ExpertBank:
        bank = self.banks[site]
        assert isinstance(bank, ExpertBank)
        return bank

    def number_of(self, expert: int | str) -> int:
        """The expert's number, from a number or a skill's name. Raises ConfigError with what there is."""
        text = str(expert)
        if text.isdigit() and any(info.number == int(text) for info in self.roster):
            return int(text)
        number = self.roster.serving(text)
        if number is None:
            skills = sorted(skill for info in self.roster for skill in info.skills)
            raise ConfigError(
                f"there is no expert {expert!r}: experts are {[info.number for info in self.roster]}"
                + (f", skills {', '.join(skills)}" if skills else "")
            )
        return number

    def parts(self, number: int) -> Iterator[LowRankExpert]:
        """An expert's factors, site by site."""
        name = self.roster.info(number).name
        return (self.bank(site).expert(name) for site in self.banks)

    def live_factors(self, number: int) -> list[nn.Parameter]:
        """The factors that train; of a thousand experts nearly all are frozen everywhere and cost no look."""
        if len(self.roster.info(number).frozen) == len(self.banks):
            return []
        return [parameter for part in self.parts(number) for parameter in part.parameters()]

    def factors(self, number: int) -> list[Factors]:
        """Of an expert at every site, its scale in ``up``."""
        scale = self.roster.info(number).scale
        return [(part.down.detach().float(), part.up.detach().float() * scale) for part in self.parts(number)]

    def size(self, rank: int) -> int:
        """Numbers in an expert of this rank."""
        return rank * sum(inputs + outputs for inputs, outputs in self.sizes.values())

    def total_size(self) -> int:
        return self.size(sum(info.rank for info in self.roster))

    def mature(self) -> list[int]:
        maturity = self.roster.maturity(self.config.maturity_steps)
        return [info.number for info, m in zip(self.roster, maturity, strict=True) if m >= 1]

    def sites_named(self, targets: Sequence[str]) -> list[str]:
        """Sites whose linear is one of ``targets`` (whole names). Raises ConfigError for one that matches none."""
        for target in targets:
            if not any(is_target(site, target) for site in self.banks):
                leaves = ", ".join(sorted({site.split("/")[-1] for site in self.banks}))
                raise ConfigError(f"freeze_first: {target!r} has no experts; they sit on {leaves}")
        return [site for site in self.banks if any(is_target(site, target) for target in targets)]

    # -- coming -----------------------------------------------------------------------------------------
    def found(self) -> None:
        """The experts of the start."""
        for _ in range(self.config.experts):
            self.add(self.config.r, "start", alpha=self.config.alpha, founder=True)

    def add(
        self,
        rank: int | None = None,
        reason: str = "asked for",
        *,
        alpha: float | None = None,
        **facts: object,
    ) -> int:
        """A new expert: maturity 0 and B = 0, so the model computes what it did, bit for bit. Returns its number.

        ``facts``: more of its ExpertInfo; one on trial needs no room. Raises ConfigError at ``spawn.max_experts`` or
        ``max_parameters``, unless ``evict`` makes room.
        """
        rank = self.config.new_r if rank is None else rank
        alpha = rank * self.config.new_alpha / self.config.new_r if alpha is None else alpha
        if not facts.get("on_trial"):
            self.make_room(rank)
        info = self.roster.add(rank, alpha, reason=reason, **facts)
        info.pinned = info.number in self.config.pinned
        device = self.roster.device
        for site, (inputs, outputs) in self.sizes.items():
            stream = generator(self.seed, info.number, f"lora_experts.init.{site}")
            self.bank(site).add(info.name, LowRankExpert.fresh(inputs, outputs, rank, stream).to(device))
        self.routers.add(info.number, self.seed, device)
        return info.number

    def lacks_room(self, rank: int) -> str | None:
        """Why no further expert of this rank can be kept, or None. Those on trial or at rest do not count."""
        kept = self.roster.kept
        cap, limit = self.config.max_parameters, self.config.spawn.max_experts
        if len(kept) >= limit:
            return f"spawn.max_experts={limit} reached: raise it, or set evict: true"
        size = self.size(sum(info.rank for info in kept) + rank)
        if cap is not None and size > cap:
            return (
                f"an expert of rank {rank} makes {size} parameters, over max_parameters={cap}: raise it, lower new_r, "
                "or set evict: true"
            )
        return None

    def make_room(self, rank: int) -> None:
        """Evict the least used while that is needed and allowed. Raises ConfigError where it does not help."""
        while (reason := self.lacks_room(rank)) is not None:
            least = self.least_used() if self.config.evict else None
            if least is None:
                raise ConfigError(reason)
            self.evict(least)

    # -- going ------------------------------------------------------------------------------------------
    def least_used(self) -> int | None:
        """Lowest moving usage among the mature that are neither pinned nor training; None: there is none."""
        mature = set(self.mature())
        able = [
            (float(self.roster.usage[self.roster.place(info.number)]), info.number)
            for info in self.roster.kept
            if info.number in mature and not info.pinned and info.number != self.current
        ]
        return min(able)[1] if able else None

    def evict(self, number: int) -> None:
        """Remove an expert everywhere: factors, router rows, figures, prototype; its optimizer state goes with it.

        Raises ConfigError for a pinned expert, the last mature one, or the one that trains.
        """
        reasons = {
            "is pinned": self.roster.info(number).pinned,
            "trains": number == self.current,
            "is the last mature one": not set(self.mature()) - {number},
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None:
            raise ConfigError(f"expert {number} {why}: it cannot be evicted")
        self.remove(number)

    def remove(self, number: int, heir: int | None = None) -> None:
        """Take an expert out; ``heir`` gets its skills, what it served, its maturity and its prototypes."""
        roster, info = self.roster, self.roster.info(number)
        if heir is not None:
            to = roster.info(heir)
            to.skills += [skill for skill in info.skills if skill not in to.skills]
            to.founder |= info.founder
            for total in (roster.usage, roster.served):
                total[roster.place(heir)] += total[roster.place(number)]
            roster.age[roster.place(heir)] = max(roster.age[roster.place(n)] for n in (heir, number))
            self.routers.give(number, heir)
        self._clear(roster.remove(number))
        self.on_removal(number, heir)

    @torch.no_grad()
    def rest(self, number: int) -> None:
        """B = 0: the expert does what the base does, and keeps its skills' names and prototypes."""
        for part in self.parts(number):
            part.up.zero_()
        info = self.roster.info(number)
        info.on_trial, info.resting = False, True

    @contextmanager
    def trying(self, number: int, factors: Sequence[Factors]) -> Iterator[None]:
        """Inside, the expert has these factors; afterwards its own, bit for bit."""
        own = [(part.down.detach().clone(), part.up.detach().clone()) for part in self.parts(number)]
        try:
            self.write(number, factors)
            yield
        finally:
            self.write(number, own)

    @torch.no_grad()
    def write(self, number: int, factors: Sequence[Factors]) -> None:
        """Give an expert other values; Parameters stay what they are."""
        for part, (down, up) in zip(self.parts(number), factors, strict=True):
            part.down.copy_(down)
            part.up.copy_(up)

    # -- changing ---------------------------------------------------------------------------------------
    def freeze(self, number: int, sites: Sequence[str] | None = None) -> None:
        """Parameters become buffers at the given sites (None: all): no gradient, momentum or decay moves them."""
        info = self.roster.info(number)
        for site in self.banks if sites is None else sites:
            if site not in info.frozen:
                self.bank(site).expert(info.name).freeze(True)
                info.frozen.append(site)

    def thaw(self, number: int) -> None:
        info = self.roster.info(number)
        for site in info.frozen:
            self.bank(site).expert(info.name).freeze(False)
        info.frozen = []

    def train_only(self, number: int) -> None:
        """That expert trains; with ``freeze_others`` no other does."""
        self.current = number
        self.thaw(number)
        if self.config.freeze_others:
            for info in self.roster:
                if info.number != number:
                    self.freeze(info.number)

    def widen(self, number: int) -> None:
        """r' = 2 r, alpha' = 2 alpha, A' = [A; random], B' = [B; 0]: the same function, with room."""
        info = self.roster.info(number)
        for site in self.banks:
            stream = generator(self.seed, info.number, f"lora_experts.double.{info.rank}.{site}")
            old = self.bank(site).expert(info.name)
            wide = old.widened(stream)
            wide.freeze(old.frozen)
            self.bank(site).add(info.name, wide)
        info.rank, info.alpha = 2 * info.rank, 2 * info.alpha

    # -- saving -----------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        sites = {site: list(size) for site, size in self.sizes.items()}
        return {
            "sites": sites,
            "hidden_size": self.hidden_size,
            "roster": self.roster.structure(),
            "routers": self.routers.structure(),
            "current": self.current,
        }

    def restore(self, structure: Structure) -> None:
        """Exactly the saved experts, with factors and rows of the right shapes, before a strict load."""
        for info in self.roster:
            self._clear(info)
        self.roster.restore(structure["roster"])
        self.current = structure["current"]
        device = self.roster.device
        self.routers.restore(structure["routers"], [info.number for info in self.roster], device)
        for info in self.roster:
            for site, (inputs, outputs) in self.sizes.items():
                shapes = (info.rank, inputs), (info.rank, outputs)
                expert = LowRankExpert(*(torch.zeros(shape, device=device) for shape in shapes))
                expert.freeze(site in info.frozen)
                self.bank(site).add(info.name, expert)

    def _clear(self, info: ExpertInfo) -> None:
        for site in self.banks:
            self.bank(site).remove(info.name)
        self.routers.remove(info.number)
