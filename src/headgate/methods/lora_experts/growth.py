"""Experts come, grow, freeze, merge and go. Nothing here changes what the model computes at that moment, except
eviction and merging, which say so.

What a run decides inside a step is only noted (``pending``) and carried out at the next step boundary, where the
trainer can rebuild its optimizer: between the note and the boundary lies the optimizer's step on the old tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headgate.errors import ConfigError
from headgate.methods.lora_experts.merging import REST, rest
from headgate.methods.lora_experts.roster import Roster
from headgate.methods.lora_experts.targets import is_target
from headgate.methods.lora_experts.watching import BURST
from headgate.modules.expert_bank import ExpertBank, LowRankExpert
from headgate.modules.expert_router import ExpertRouter
from headgate.modules.prototype_router import PrototypeRouter
from headgate.ops.randomness import generator

if TYPE_CHECKING:
    from headgate.methods.lora_experts.config import LoraExpertsConfig


class GrowingExperts:
    """The part of LoraExperts that changes which experts there are."""

    config: LoraExpertsConfig
    seed: int
    roster: Roster
    banks: nn.ModuleDict
    routers: nn.ModuleDict
    current: int
    pending: list[str]
    born_of_burst: Callable[[], str]

    # -- what there is ----------------------------------------------------------------------------------
    def bank(self, site: str) -> ExpertBank:
        bank = self.banks[site]
        assert isinstance(bank, ExpertBank)
        return bank

    def router(self, site: str = "shared") -> ExpertRouter | PrototypeRouter:
        router = self.routers[site]
        assert isinstance(router, (ExpertRouter, PrototypeRouter))
        return router

    def number_of(self, expert: int | str) -> int:
        """The expert's number, from a number or a skill's name. Raises ConfigError with what there is."""
        text = str(expert)
        if text.isdigit() and any(info.number == int(text) for info in self.roster):
            return int(text)
        found = self.roster.serving(text)
        if found is None:
            skills = sorted(skill for info in self.roster for skill in info.skills)
            raise ConfigError(
                f"there is no expert {expert!r}: experts are {[info.number for info in self.roster]}"
                + (f", skills {', '.join(skills)}" if skills else "")
            )
        return found

    def expert_parameters(self, number: int) -> list[nn.Parameter]:
        """Live factors of one expert over all sites."""
        return [
            p
            for site in self.banks
            for p in self.bank(site).expert(self.roster.info(number).name).parameters()
        ]

    def size(self, rank: int) -> int:
        """Numbers in an expert of this rank."""
        return sum(rank * (self.bank(site).in_features + self.bank(site).out_features) for site in self.banks)

    def total_size(self) -> int:
        return sum(self.size(info.rank) for info in self.roster)

    # -- coming -----------------------------------------------------------------------------------------
    def spawn(
        self,
        rank: int | None = None,
        reason: str = "asked for",
        *,
        alpha: float | None = None,
        skill: str | None = None,
        step: int = 0,
        founder: bool = False,
    ) -> int:
        """A new expert: maturity 0 and B = 0, so the model computes what it did, bit for bit. Returns its number.

        Raises ConfigError at ``spawn.max_experts`` or ``max_parameters``, unless ``evict`` makes room.
        """
        rank = self.config.new_r if rank is None else rank
        if alpha is None:
            alpha = rank * self.config.new_alpha / self.config.new_r
        self._make_room(rank)
        info = self.roster.add(
            rank, alpha, born=step, reason=reason, founder=founder, skills=[skill] if skill else []
        )
        info.pinned = info.number in self.config.pinned
        for site in self.banks:
            bank, stream = self.bank(site), generator(self.seed, info.number, f"lora_experts.init.{site}")
            expert = LowRankExpert.fresh(bank.in_features, bank.out_features, rank, stream)
            bank.add(info.name, expert.to(self.roster.age.device))
        for site in self.routers:
            router = self.router(site)
            stream = generator(self.seed, info.number, f"lora_experts.router.{site}")
            row = torch.randn(router.features, generator=stream) * self.config.router_std
            router.add(info.name, row.to(self.roster.age.device))
        return info.number

    def _make_room(self, rank: int) -> None:
        cap, limit = self.config.max_parameters, self.config.spawn.max_experts
        while True:
            many = len(self.roster) >= limit
            large = cap is not None and self.total_size() + self.size(rank) > cap
            if not many and not large:
                return
            if self.config.evict and (least := self.least_used()) is not None:
                self.evict(least)
            elif many:
                raise ConfigError(f"spawn.max_experts={limit} reached: raise it, or set evict: true")
            else:
                raise ConfigError(
                    f"an expert of rank {rank} makes {self.total_size() + self.size(rank)} parameters, over "
                    f"max_parameters={cap}: raise it, lower new_r, or set evict: true"
                )

    # -- going ------------------------------------------------------------------------------------------
    def least_used(self) -> int | None:
        """Lowest moving usage among the mature that are neither pinned nor training; None: there is none."""
        maturity = self.roster.maturity(self.roster.age.tolist(), self.config.maturity_steps)
        able = [
            (float(usage), info.number)
            for info, usage, m in zip(self.roster, self.roster.usage, maturity, strict=True)
            if m >= 1 and not info.pinned and info.number != self.current
        ]
        return min(able)[1] if able else None

    def evict(self, number: int) -> None:
        """Remove an expert everywhere: factors, router rows, figures, prototype; its optimizer state goes with it.

        Raises ConfigError for a pinned expert, the last mature one, or the one that trains.
        """
        info = self.roster.info(number)
        maturity = self.roster.maturity(self.roster.age.tolist(), self.config.maturity_steps)
        others = [m for other, m in zip(self.roster, maturity, strict=True) if other.number != number]
        if info.pinned or number == self.current or not any(m >= 1 for m in others):
            why = (
                "is pinned"
                if info.pinned
                else "trains"
                if number == self.current
                else "is the last mature one"
            )
            raise ConfigError(f"expert {number} {why}: it cannot be evicted")
        self.roster.remove(number)
        for site in self.banks:
            self.bank(site).remove(info.name)
        for site in self.routers:
            self.router(site).remove(info.name)
        self._forget(number)

    def _forget(self, number: int) -> None:
        """Remove an expert from the skill library."""

    # -- changing ---------------------------------------------------------------------------------------
    def freeze(self, number: int, sites: Sequence[str] | None = None) -> None:
        """Parameters become buffers at the given sites (None: all): no gradient, momentum or decay moves them."""
        info = self.roster.info(number)
        for site in self.banks if sites is None else sites:
            self.bank(site).expert(info.name).freeze(True)
            if site not in info.frozen:
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

    def double_rank(self, number: int) -> None:
        """r' = 2 r, alpha' = 2 alpha, A' = [A; random], B' = [B; 0]: the same function, with room."""
        info = self.roster.info(number)
        for site in self.banks:
            bank = self.bank(site)
            stream = generator(self.seed, info.number, f"lora_experts.double.{info.rank}.{site}")
            old = bank.expert(info.name)
            wide = old.widened(stream)
            wide.freeze(old.frozen)
            bank.add(info.name, wide)
        info.rank, info.alpha = 2 * info.rank, 2 * info.alpha

    def carry_out(self) -> str | None:
        """Do what is pending; what was done, or None."""
        done = []
        info = self.roster.info(self.current)
        for what in self.pending:
            if what == BURST:
                done.append(self.born_of_burst())
            elif what == REST:
                done.append(rest(self))  # type: ignore[arg-type]
            elif what == "double":
                self.double_rank(self.current)
                done.append(f"expert {info.number} has rank {info.rank}")
            else:
                self.freeze(
                    self.current,
                    self.sites_named(self.config.freeze_first) if what == "freeze_first" else None,
                )
                done.append(f"expert {info.number} frozen{' in part' if what == 'freeze_first' else ''}")
        self.pending.clear()
        return "; ".join(done) or None

    def sites_named(self, targets: Sequence[str]) -> list[str]:
        """Sites whose linear is one of ``targets`` (whole names). Raises ConfigError for one that matches none."""
        for target in targets:
            if not any(is_target(site, target) for site in self.banks):
                raise ConfigError(
                    f"freeze_first: {target!r} has no experts; they sit on {', '.join(sorted({s.split('/')[-1] for s in self.banks}))}"
                )
        return [site for site in self.banks if any(is_target(site, target) for target in targets)]

    def judge(self, loss: float, step: int) -> None:
        """An evaluation of the skill in training: note a doubling or a freezing for the next boundary."""
        config, roster, place = self.config, self.roster, self.roster.place(self.current)
        best = float(roster.best_eval[place])
        if not best <= loss:
            roster.best_eval[place] = loss
            roster.stale_evals[place] = 0
        else:
            roster.stale_evals[place] += 1
        stale = int(roster.stale_evals[place])
        if config.freeze_after is not None and stale:
            first = bool(config.freeze_first)
            if first and stale == config.freeze_after:
                self.pending.append("freeze_first")
            elif stale == config.freeze_after * (2 if first else 1):
                self.pending.append("freeze")
        if config.double_after is None:
            return
        reference = float(roster.reference_eval[place])
        if reference != reference:
            roster.reference_eval[place], roster.reference_step[place] = loss, step
        elif step - int(roster.reference_step[place]) >= config.double_after:
            if (reference - loss) / reference < config.double_gain and 2 * roster.infos[
                place
            ].rank <= config.max_rank:
                self.pending.append("double")
            roster.reference_eval[place], roster.reference_step[place] = loss, step

    # -- rebuilding -------------------------------------------------------------------------------------
    def rebuild(self, structure: dict[str, Any]) -> None:
        """Exactly the saved experts, with factors and rows of the right shapes, before a strict load."""
        for info in list(self.roster):
            for site in self.banks:
                self.bank(site).remove(info.name)
            for site in self.routers:
                self.router(site).remove(info.name)
        self.roster.restore(structure)
        device = self.roster.age.device
        for info in self.roster:
            for site in self.banks:
                bank = self.bank(site)
                down = torch.zeros(info.rank, bank.in_features, device=device)
                expert = LowRankExpert(down, torch.zeros(info.rank, bank.out_features, device=device))
                expert.freeze(site in info.frozen)
                bank.add(info.name, expert)
            for site in self.routers:
                self.router(site).add(info.name, torch.zeros(self.router(site).features, device=device))

    def found(self, count: int) -> None:
        """The experts of the start."""
        for _ in range(count):
            self.spawn(self.config.r, "start", alpha=self.config.alpha, founder=True)
