"""Laws of the bank and of what the router reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headgate.methods.lora_experts.roster import Roster
from headgate.modules.expert_bank import SPARE, ExpertBank, Mixture
from headgate.modules.expert_router import ExpertRouter
from headgate.modules.feature_sketch import FeatureSketch
from headgate.modules.low_rank_expert import LowRankExpert
from headgate.modules.prototype_router import PrototypeRouter
from headgate.ops.causal_mean import causal_mean
from headgate.ops.gating import Gates

NAMES = ("1", "10", "0", "11")


def bank_of(ranks: list[int], stream: torch.Generator) -> ExpertBank:
    bank = ExpertBank(5, 3)
    for name, rank in zip(NAMES, ranks, strict=False):
        expert = LowRankExpert.fresh(5, 3, rank, stream)
        with torch.no_grad():
            expert.up.normal_(generator=stream)
        bank.add(name, expert)
    return bank.double()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 9), st.booleans())
def test_the_bank_is_the_loop_over_its_experts(ranks: list[int], seed: int, frozen: bool) -> None:
    """Outputs and every gradient, mixed ranks, one expert frozen; by a loop that shares no code with the bank."""
    stream = torch.Generator().manual_seed(seed)
    bank, names = bank_of(ranks, stream), NAMES[: len(ranks)]
    if frozen:
        bank.expert(names[0]).freeze(True)
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=stream)
    gates = torch.rand(2, 4, len(ranks), dtype=torch.float64, generator=stream)
    push = torch.randn(2, 4, 3, dtype=torch.float64, generator=stream)

    def gradients(route: str) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {"x": x.clone().requires_grad_(), "gates": gates.clone().requires_grad_()}
        bank.zero_grad()
        if route == "bank":
            mixture = Mixture(
                names, Gates(leaves["gates"], leaves["gates"]), leaves["gates"], leaves["gates"]
            )
            y = bank(leaves["x"], mixture)
        else:
            y = torch.zeros_like(push)
            for place, name in enumerate(names):
                expert = bank.expert(name)
                y = y + leaves["gates"][..., place : place + 1] * (leaves["x"] @ expert.down.T @ expert.up)
        (y * push).sum().backward()
        found = {**leaves, **dict(bank.named_parameters())}
        return y.detach(), {name: leaf.grad.clone() for name, leaf in found.items()}  # type: ignore[union-attr]

    (ours, our_gradients), (theirs, their_gradients) = gradients("bank"), gradients("loop")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert our_gradients.keys() == their_gradients.keys()
    assert len(our_gradients) == 2 + 2 * (len(ranks) - frozen)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 2), st.integers(0, 9))
def test_one_token_reads_its_chosen_experts_as_they_are_now(ranks: list[int], k: int, seed: int) -> None:
    """A decoding step is the loop over the chosen experts; also after a factor was written to."""
    stream = torch.Generator().manual_seed(seed)
    bank, names = bank_of(ranks, stream), NAMES[: len(ranks)]
    x = torch.randn(1, 1, 5, dtype=torch.float64, generator=stream)
    gates = torch.rand(1, 1, len(ranks), dtype=torch.float64, generator=stream)
    chosen = gates.topk(k).indices
    kept = torch.zeros_like(gates).scatter(-1, chosen, gates.gather(-1, chosen))
    for _ in range(2):
        mixture = Mixture(names, Gates(kept, kept, chosen), kept, 2 * kept)
        with torch.no_grad():
            found, wanted = bank(x, mixture), torch.zeros(1, 1, 3, dtype=torch.float64)
            for place, name in enumerate(names):
                expert = bank.expert(name)
                wanted += 2 * kept[..., place : place + 1] * (x @ expert.down.T @ expert.up)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            bank.expert(names[-1]).up.mul_(-3)


def test_of_many_experts_a_few_tokens_read_their_own() -> None:
    """Fifty experts of mixed rank, three tokens, two linears that share a grouping: the loop over the chosen ones."""
    stream = torch.Generator().manual_seed(0)
    names = tuple(map(str, range(50)))
    banks = [ExpertBank(5, 3), ExpertBank(5, 3)]
    for bank in banks:
        for place, name in enumerate(names):
            expert = LowRankExpert.fresh(5, 3, 3 + place % 3, stream)
            torch.nn.init.normal_(expert.up, generator=stream)
            bank.add(name, expert)
    x = torch.randn(1, 3, 5, generator=stream)
    chosen = torch.tensor([[[7], [49], [7]]])
    kept = torch.zeros(1, 3, 50).scatter(-1, chosen, torch.rand(1, 3, 1, generator=stream))
    mixture = Mixture(names, Gates(kept, kept, chosen), kept, kept, paid=kept.gather(-1, chosen))
    for bank in (*banks, banks[0]):
        with torch.no_grad():
            found = bank(x, mixture)[0]
        for token, number in enumerate([7, 49, 7]):
            expert = bank.expert(str(number))
            wanted = kept[0, token, number] * (x[0, token] @ expert.down.T @ expert.up)
            torch.testing.assert_close(found[token], wanted)
    assert list(mixture.grouped) == [(1, 3)]  # made once, for all of them


@pytest.mark.parametrize("fused", [False, True])
def test_packed_factors_follow_every_change(fused: bool) -> None:
    """What a forward without gradients reads is the live value, whoever wrote it and however: a fused optimizer does not
    raise a tensor's version, ``.data`` is assigned, an expert is swapped, removed, thawed or moved to another type."""
    stream = torch.Generator().manual_seed(0)
    bank = bank_of([2, 3], stream)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, fused=fused)

    def assign() -> None:
        bank.expert("10").up.data = torch.randn(3, 3, dtype=torch.float64)

    for change in (
        lambda: None,
        assign,
        lambda: bank.expert("1").down.data.mul_(3),
        lambda: (bank.float(), bank.double()),
        lambda: (bank(torch.ones(1, 1, 5).double(), mixture()).sum().backward(), optimizer.step()),
        lambda: bank.load_state_dict({n: t * 2 for n, t in bank.state_dict().items()}),
        lambda: bank.expert("1").freeze(True),
        lambda: (bank(torch.ones(1, 1, 5).double(), mixture()).sum().backward(), optimizer.step()),
        lambda: bank.expert("1").freeze(False),
        lambda: bank.add("10", LowRankExpert.fresh(5, 3, 4, stream).double()),
    ):
        change()
        with torch.no_grad():
            down, up = bank.packed(("1", "10"))
        assert torch.equal(down, torch.cat([bank.expert(n).down for n in ("1", "10")]))
        assert torch.equal(up, torch.cat([bank.expert(n).up for n in ("1", "10")]))
    with torch.no_grad():
        down, _ = bank.packed(("10", "1"))
    assert torch.equal(down, torch.cat([bank.expert(n).down for n in ("10", "1")])), "in the order asked for"


def test_experts_are_held_once() -> None:
    """Packing leaves Parameters and values as they were, and no second copy in memory."""
    bank = bank_of([2, 3, 4], torch.Generator().manual_seed(0))
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in bank.named_parameters()}
    with torch.no_grad():
        packed = bank.packed(("1", "10", "0"))
        whole = sum(t.untyped_storage().nbytes() for t in packed)
    for name, parameter in bank.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in bank.parameters()}
    assert sum(storages.values()) == whole == sum(p.nbytes for p in bank.parameters())


def test_a_birth_copies_no_other_expert() -> None:
    """It goes into spare rows, and one that is dropped leaves them to the next; values are what they were."""
    stream = torch.Generator().manual_seed(0)
    bank = ExpertBank(5, 3)
    for number in range(SPARE):
        bank.add(str(number), LowRankExpert.fresh(5, 3, 2, stream))
    with torch.no_grad():
        names = tuple(bank.experts)
        bank.packed(names)
        place = {name: bank.expert(name).down.data_ptr() for name in names}
        for _ in range(2):
            young = LowRankExpert.fresh(5, 3, 2, stream)
            wanted = young.down.detach().clone()
            bank.add("young", young)
            down, up = bank.packed((*names, "young"))
            assert torch.equal(down[-2:], wanted) and torch.equal(young.down, wanted)
            assert down.data_ptr() == place["0"] and up.shape == (2 * SPARE + 2, 3)
            assert all(bank.expert(name).down.data_ptr() == at for name, at in place.items())
            bank.remove("young")
        assert bank.packed(names)[0].shape == (2 * SPARE, 5)
    own = sum(p.nbytes for p in bank.parameters())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in bank.parameters()}
    assert sum(held.values()) <= own * (1 + 1 / SPARE), "spare rows are all that is held besides"


def mixture() -> Mixture:
    gates = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    return Mixture(("1", "10"), Gates(gates, gates), gates, gates)


def test_freezing_keeps_names_and_values_and_ends_gradients() -> None:
    bank = bank_of([2, 2], torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.expert("10").freeze(True)
    assert {n for n, _ in bank.named_parameters()} == {"experts.1.down", "experts.1.up"}
    assert all(torch.equal(before[n], t) for n, t in bank.state_dict().items()) and len(before) == 4
    bank.expert("10").freeze(False)
    assert isinstance(bank.expert("10").down, nn.Parameter) and bank.expert("10").down.requires_grad


def test_a_wider_expert_is_the_same_function() -> None:
    bank = bank_of([3], torch.Generator().manual_seed(1))
    old = bank.expert("1")
    wide = old.widened(torch.Generator().manual_seed(2))
    x = torch.randn(4, 5, dtype=torch.float64)
    assert wide.rank == 6 and not wide.down[3:].eq(0).any()
    torch.testing.assert_close(x @ wide.down.T @ wide.up, x @ old.down.T @ old.up)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 9), st.integers(1, 8))
def test_the_running_mean_is_the_mean_of_the_document_so_far(lengths: list[int], seed: int, cut: int) -> None:
    """Against a loop; and continued from any cut it is what one pass gives."""
    stream = torch.Generator().manual_seed(seed)
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    x = torch.randn(2, document.shape[1], 3, generator=stream)
    counted = torch.rand(document.shape, generator=stream) < 0.7
    found, _ = causal_mean(x, counted, document)
    for row in range(2):
        for t in range(document.shape[1]):
            seen = (
                counted[row] & (document[row] == document[row, t]) & (torch.arange(len(document[row])) <= t)
            )
            wanted = x[row][seen].mean(0) if seen.any() else torch.zeros(3)
            torch.testing.assert_close(found[row, t], wanted, atol=1e-5, rtol=1e-4)
    cut = min(cut, lengths[0])
    one = torch.zeros(2, lengths[0], dtype=torch.long)
    first, state = causal_mean(x[:, :cut], counted[:, :cut], one[:, :cut])
    if cut < lengths[0]:
        rest, _ = causal_mean(x[:, cut : lengths[0]], counted[:, cut : lengths[0]], one[:, cut:], state)
        torch.testing.assert_close(rest, found[:, cut : lengths[0]], atol=1e-5, rtol=1e-4)
    assert torch.equal(first, found[:, :cut])


def test_protected_logits_do_not_move_whatever_the_optimizer_does() -> None:
    """Logits of inputs in the protected subspace stay through AdamW with decay; others move, new rows included."""
    stream = torch.Generator().manual_seed(0)
    router, sketch = ExpertRouter(12, directions=4), FeatureSketch(12, 4)
    for name in ("0", "1"):
        router.add(name, torch.randn(12, generator=stream))
    old = torch.randn(30, 3, generator=stream) @ torch.randn(3, 12, generator=stream)
    for part in old.split(6):
        sketch.add(part[None], torch.ones(1, len(part), dtype=torch.bool))
    basis = sketch.basis()
    assert basis is not None
    router.protect(basis)
    router.add("2", torch.randn(12, generator=stream))
    names, new = ["0", "1", "2"], torch.randn(6, 12, generator=stream)
    before = router(old, names).detach(), router(new, names).detach()
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (router(torch.cat([old, new]), names) - 3).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(router(old, names).detach(), before[0], atol=1e-3, rtol=1e-3)
    assert (router(new, names) - before[1]).abs().min(0).values.max() > 0.1


def _an_optimizer_step(router: ExpertRouter) -> None:
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, fused=True)  # writes without raising a version
    router(torch.ones(2, 5), list(router.rows)).sum().backward()
    optimizer.step()


ROUTER_CHANGES = {
    "an optimizer step": _an_optimizer_step,
    "another row": lambda router: router.replace("1", torch.full((5,), 7.0)),
    "a birth": lambda router: router.add("9", torch.full((5,), 3.0)),
    "a death": lambda router: router.remove("0"),
    "a load": lambda router: router.load_state_dict({k: v + 1 for k, v in router.state_dict().items()}),
    "a load that assigns": lambda router: router.load_state_dict(
        {k: v.clone() + 1 for k, v in router.state_dict().items()}, assign=True
    ),
    "another type and back": lambda router: router.double().float(),
}


@pytest.mark.parametrize("change", ROUTER_CHANGES.values(), ids=ROUTER_CHANGES)
def test_a_routers_packed_rows_follow_every_change(change) -> None:
    """Logits without gradients, from the common matrix, are those with gradients, from the rows; in any order of names."""
    router, stream = ExpertRouter(5), torch.Generator().manual_seed(0)
    for name in "0123":
        router.add(name, torch.randn(5, generator=stream))
    features = torch.randn(2, 3, 5, generator=stream)
    with torch.inference_mode():
        router(features, list(router.rows))  # packs
    change(router)
    kept = dict(router.rows)
    for names in (list(router.rows), list(router.rows)[::-1], list(router.rows)[1:]):
        with torch.no_grad():
            logits = router(features, names)
        torch.testing.assert_close(logits, router(features, names).detach(), atol=0, rtol=0)
        torch.testing.assert_close(logits, features @ torch.stack([kept[name].detach() for name in names]).T)
    assert all(router.rows[name] is row for name, row in kept.items()), "a Parameter lost its identity"


def test_rows_that_nobody_changed_are_not_packed_again() -> None:
    router = ExpertRouter(5)
    for name in "012":
        router.add(name, torch.ones(5))
    with torch.no_grad():
        packed = [router.weight(list("012")).data_ptr() for _ in range(3)]
    assert len(set(packed)) == 1


def test_restored_experts_stand_where_the_run_computes_and_their_ages_on_the_host() -> None:
    roster = Roster()
    roster.add(4, 8.0, skills=["farm"])
    saved = roster.structure()
    roster.to("meta").restore({**saved, "experts": saved["experts"] * 3})
    assert roster.device.type == "meta" and roster.served.shape == (3,)
    assert roster.age.device.type == "cpu" and roster.age.tolist() == [0, 0, 0]


def test_experts_share_a_merge_by_what_they_served_however_little() -> None:
    roster = Roster()
    for _ in range(3):
        roster.add(4, 8.0)
    assert roster.served_shares([0, 2]) == [0.5, 0.5]
    roster.served.copy_(torch.tensor([0.125, 9.0, 0.375]))
    assert roster.served_shares([0, 2]) == [0.25, 0.75]


def test_later_rows_of_an_earlier_skill_are_its_own() -> None:
    router = PrototypeRouter(2)
    router.learn("a", torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    router.learn("b", torch.tensor([[5.0, 5.0], [7.0, 5.0]]))
    router.learn("a", torch.tensor([[4.0, 0.0]]))
    assert router.owners == ["a", "b"] and router.count.tolist() == [3, 2]
    assert router.mean.tolist() == [[2.0, 0.0], [6.0, 5.0]]
    assert router.scatter.tolist() == [[[8.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]]
