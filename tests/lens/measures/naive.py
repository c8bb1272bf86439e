"""The measures in plain loops over the rows, as their definitions say them; slow, and easy to check by reading."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import permutations, product
from math import log

from tests.lens.measures.traces import rows_of

NAN = float("nan")


def tokens_of(trace, layer):
    """{(sequence, position): (token, domain, [experts, best first])} of one layer, in reading order."""
    found = defaultdict(list)
    about = {}
    for sequence, position, at, choice, token, expert, domain in rows_of(trace):
        if at == layer:
            found[sequence, position].append((choice, expert))
            about[sequence, position] = token, domain
    return {place: (*about[place], [e for _, e in sorted(found[place])]) for place in sorted(found)}


def loads(trace, layer):
    count = Counter(row[5] for row in rows_of(trace) if row[2] == layer)
    return [count[expert] for expert in range(trace.metadata.num_experts[layer])]


def max_over_mean(trace, layer):
    load = loads(trace, layer)
    return max(load) * len(load) / sum(load) if sum(load) else NAN


def coefficient_of_variation(trace, layer):
    load = loads(trace, layer)
    mean = sum(load) / len(load)
    return (sum((one - mean) ** 2 for one in load) / len(load)) ** 0.5 / mean if mean else NAN


def load_entropy(trace, layer):
    load = loads(trace, layer)
    if not sum(load) or len(load) == 1:
        return NAN
    return -sum(one / sum(load) * log(one / sum(load)) for one in load if one) / log(len(load))


def dead_experts(trace, layer):
    load = loads(trace, layer)
    return load.count(0) if sum(load) else NAN


def drop_rate(trace, layer):
    kept = [bool(k) for k, at in zip(trace.kept, trace.layer, strict=True) if at == layer]
    return kept.count(False) / len(kept) if kept else NAN


def experts_per_token(trace, layer):
    tokens = tokens_of(trace, layer).values()
    return sum(len(experts) for _, _, experts in tokens) / len(tokens) if tokens else NAN


def choices_of_tokens(trace, layer):
    everywhere = {row[:2] for row in rows_of(trace)}
    tokens = tokens_of(trace, layer)
    return Counter(len(tokens[place][2]) if place in tokens else 0 for place in everywhere)


def domain_share(trace, layer, domain, expert):
    mine = [row for row in rows_of(trace) if row[2] == layer and row[6] == domain]
    return sum(row[5] == expert for row in mine) / len(mine) if mine else NAN


def domain_specialisation(trace, layer, domain, expert, *, first_only):
    mine = [experts for _, at, experts in tokens_of(trace, layer).values() if at == domain]
    taken = [expert in (experts[:1] if first_only else experts) for experts in mine]
    return sum(taken) / len(taken) if taken else NAN


def vocabulary_specialisation(trace, layer, *, first_only, min_tokens):
    of_token = defaultdict(list)
    for token, _, experts in tokens_of(trace, layer).values():
        if token >= 0:
            of_token[token].append(experts[:1] if first_only else experts)
    shares = []
    for taken in of_token.values():
        if len(taken) >= min_tokens:
            count = Counter(expert for experts in taken for expert in experts)
            shares.append(max(count.values()) / len(taken))
    return sum(shares) / len(shares) if shares else NAN


def repetition(trace, layer, *, first_only):
    tokens = tokens_of(trace, layer)
    met = []
    for (sequence, position), (_, _, experts) in tokens.items():
        if (sequence, position + 1) in tokens:
            following = tokens[sequence, position + 1][2]
            met.append(experts[0] == following[0] if first_only else bool(set(experts) & set(following)))
    return sum(met) / len(met) if met else NAN


def chance_of_repetition(trace, layer, *, first_only, same_text):
    """Over all pairs of different tokens: of one text each weighted by its neighbours, or of the whole layer."""
    texts = defaultdict(list)
    for (sequence, _), (_, _, experts) in tokens_of(trace, layer).items():
        texts[sequence if same_text else 0].append(experts[:1] if first_only else experts)
    shared, pairs = 0.0, 0
    for experts in texts.values():
        if len(experts) > 1:
            meet = [bool(set(one) & set(other)) for one, other in permutations(experts, 2)]
            shared += sum(meet) / len(meet) * (len(experts) - 1)
            pairs += len(experts) - 1
    return shared / pairs if pairs else NAN


def coactivation(trace, layer, one, other):
    mine = [experts for _, _, experts in tokens_of(trace, layer).values() if one in experts]
    return sum(other in experts for experts in mine) / len(mine) if mine and one != other else NAN


def saturation(trace, final, layer, *, first_only):
    early, late = tokens_of(trace, layer), tokens_of(final, layer)
    both = [place for place in early if place in late]
    shared, chance = [], []
    end = 1 if first_only else None
    for place in both:
        wanted = set(late[place][2][:end])
        shared.append(len(set(early[place][2][:end]) & wanted) / len(wanted))
    for place, elsewhere in product(both, both):
        wanted = set(late[place][2][:end])
        chance.append(len(set(early[elsewhere][2][:end]) & wanted) / len(wanted))
    return (sum(shared) / len(shared), sum(chance) / len(chance)) if both else (NAN, NAN)


def guess(learned, scored, keys, num_experts):
    """Right guesses of (keys, expert) pairs: by the first key that was met, else the commonest; lowest of equals."""

    def commonest(experts):
        return max(range(num_experts), key=lambda expert: (experts.count(expert), -expert))

    right = 0
    for example, expert in scored:
        for key in keys:
            met = [other for known, other in learned if known[key] == example[key]]
            if met:
                break
        else:
            met = [other for _, other in learned]
        right += commonest(met) == expert
    return right


def guessed(examples, keys, num_experts):
    """Accuracy over both halves of (sequence, {key: value}, expert) examples."""
    rank = {sequence: place for place, sequence in enumerate(sorted({sequence for sequence, _, _ in examples}))}
    halves = [[(known, e) for sequence, known, e in examples if rank[sequence] % 2 == half] for half in (0, 1)]
    if not halves[1]:
        return NAN
    right = guess(halves[0], halves[1], keys, num_experts) + guess(halves[1], halves[0], keys, num_experts)
    return right / len(examples)
