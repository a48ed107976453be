"""Dense masked training and dense selection: slow, obvious, written without finepoint's core."""

import torch
from torch import nn


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)


def train_beside_dense(model, tuner, reference, chosen, batches):
    """Trains a tuner's model, and its copy `reference` densely with masked gradients, by the same steps of AdamW."""
    optimizer = adamw(tuner.parameters())
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    dense_masked_training(reference, chosen, [[batch] for batch in batches], adamw)


def dense_masked_training(model, indices, batches, make_optimizer, delta_decay=False):
    """Trains `model` (changed in place) with dense gradients, all but the chosen entries zeroed, and puts every other
    entry back after each step. `batches` is a list of steps, each a list of batches whose losses add up."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name: parameters[name] for name in indices}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    masks = {}
    for name, parameter in chosen.items():
        mask = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        mask[indices[name].to(parameter.device)] = True
        masks[name] = mask.view(parameter.shape)
    model.requires_grad_(True)
    optimizer = make_optimizer(list(chosen.values()))
    for step in batches:
        for batch in step:
            model(**batch).loss.backward()
        for name, parameter in chosen.items():
            if parameter.grad is not None:  # the loss reaches it
                parameter.grad.mul_(masks[name])
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in masks:
                    parameter.copy_(torch.where(masks[name], parameter, start[name]))
                elif not any(parameter is other for other in chosen.values()):
                    assert torch.equal(parameter, start[name])
    return model


def dense_top_k(scores, k):
    """The k largest of a dict of score tensors, by one sort of all of them; ties to the earlier weight and position."""
    rows = [
        (-value, order, position)
        for order, tensor in enumerate(scores.values())
        for position, value in enumerate(tensor.reshape(-1).tolist())
        if value > float("-inf")
    ]
    rows = sorted(rows)[:k]
    names = list(scores)
    chosen = {name: [] for name in names}
    for _, order, position in rows:
        chosen[names[order]].append(position)
    return {name: torch.tensor(sorted(found), dtype=torch.long) for name, found in chosen.items() if found}


def mean_gradient(model, batches):
    """The gradient of the loss over all labels of all batches together, by one dense backward pass on their sum."""
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad()
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        (model(**batch).loss * count / total).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def mean_squared_gradient(model, batches):
    """The mean over examples of the squared gradient of each example's log-likelihood, one example at a time."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    examples = 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            log_probs = model(**{**one, "labels": None}).logits.log_softmax(-1)
            likelihood = torch.zeros((), dtype=log_probs.dtype)
            for position in range(1, one["labels"].shape[1]):
                label = int(one["labels"][0, position])
                if label != -100:
                    likelihood = likelihood + log_probs[0, position - 1, label]
            model.zero_grad()
            likelihood.backward()
            for name, parameter in model.named_parameters():
                sums[name] += parameter.grad**2
            examples += 1
    model.zero_grad()
    return {name: total / examples for name, total in sums.items()}


class TiedToy(nn.Module):
    """Every kind of weight at once: tied embedding and head, norm, bias, 3-D experts, a reused linear layer."""

    def __init__(self, vocabulary=11, width=6, experts=3, dtype=torch.float64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.experts = nn.Parameter(torch.randn(experts, width, width) * 0.3)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, input_ids, labels=None):
        hidden = self.embed(input_ids)
        hidden = hidden + self.first(input=self.first(hidden).relu())
        hidden = self.norm(hidden)
        hidden = hidden + torch.einsum("btw,evw->btv", hidden, self.experts).tanh()
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            flat = logits[:, :-1].reshape(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100)
        return Output(loss, logits)


class Output:
    def __init__(self, loss, logits):
        self.loss = loss
        self.logits = logits


def dense_refreshed_training(model, steps, choose, loss_of, lr, keep):
    """Adam by its formulas on whole weights, of which only the entries chosen at the time move.

    `choose(done)` gives indices by weight before a step, or None where the choice stays. Entries that are chosen no
    more stay as they are (`keep`) or go back to where they began; the moments and the age of those that join are zero.
    """
    parameters = dict(model.named_parameters())
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    zeros = {name: torch.zeros_like(value) for name, value in base.items()}
    first, second, age = ({name: value.clone() for name, value in zeros.items()} for _ in range(3))
    masks = {name: value.bool() for name, value in zeros.items()}
    model.requires_grad_(True)
    for done, step in enumerate(steps):
        chosen = choose(done)
        for name, parameter in parameters.items() if chosen is not None else ():
            new = torch.zeros(parameter.numel(), dtype=torch.bool)
            new[chosen.get(name, torch.empty(0, dtype=torch.long))] = True
            new = new.view(parameter.shape)
            if not keep:
                parameter.data[masks[name] & ~new] = base[name][masks[name] & ~new]
            for state in (first, second, age):
                state[name][~(masks[name] & new)] = 0
            masks[name] = new
        model.zero_grad()
        loss_of(step).backward()
        for name, parameter in parameters.items():
            gradient = parameter.grad if parameter.grad is not None else zeros[name]
            age[name] += 1
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            ahead = first[name] / (1 - 0.9 ** age[name])
            width = (second[name] / (1 - 0.999 ** age[name])).sqrt() + 1e-8
            parameter.data -= torch.where(masks[name], lr * ahead / width, 0.0)
    model.zero_grad()
    return model


def four_bit_values(codes, state):
    """What four-bit codes of bitsandbytes, with their QuantState, stand for, entry by entry, as its format defines."""
    scales = state.absmax
    if state.nested:
        inner = state.state2
        rows = [inner.code[int(code)] * inner.absmax[i // inner.blocksize] for i, code in enumerate(scales)]
        scales = torch.stack(rows) + state.offset
    halves = [half for byte in codes.reshape(-1).view(torch.uint8).tolist() for half in (byte >> 4, byte & 15)]
    count = state.shape.numel()
    values = [state.code[half] * scales[i // state.blocksize] for i, half in enumerate(halves[:count])]
    return torch.stack(values).view(state.shape).to(state.dtype)
