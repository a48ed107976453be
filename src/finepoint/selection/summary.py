"""What a selection looks like: counts, shares, and quantiles of the chosen entries against all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finepoint.models.quantised import float_values
from finepoint.runtime import distributed
from finepoint.selection.statistics import seeded_generator

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
NEAR_ZERO = 1e-4  # below this |weight| a ratio rule is ruled by its epsilon
SAMPLE_PER_WEIGHT = 1 << 13
MOST = 1 << 20  # chosen entries from which quantiles are read off


class Summary:
    """Watches the weights go by and remembers a seeded sample of each: quantiles of all entries are estimates."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def see(self, name: str, weight: Tensor, gradient: Tensor | None) -> None:
        """Samples |weight| and |gradient| of one weight, evenly by entry count within the weight."""
        if name in self.seen:
            return
        size = min(weight.numel(), SAMPLE_PER_WEIGHT)
        draw = torch.randint(weight.numel(), (size,), generator=seeded_generator(self.seed, f"summary {name}"))
        self.seen[name] = (at(weight, draw).abs(), None if gradient is None else at(gradient, draw))

    def result(
        self,
        weights: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        plan: Sequence[Any],
        structure: str = "entry",
        within: str | None = None,
    ) -> dict[str, Any]:
        """JSON-ready: counts by weight, quantiles of |weight| and |gradient|, share of near-zero weights.

        `asked` counts what is chosen as a whole: entries, or groups of the structure.
        """
        total = sum(weight.numel() for weight in weights.values())
        count = sum(len(chosen) for chosen in indices.values())
        chosen_weights = torch.cat([at(weights[name], chosen).abs() for name, chosen in indices.items()])
        mass = torch.cat([_mass(weights[name], len(seen)) for name, (seen, _) in self.seen.items()])
        all_weights = torch.cat([seen for seen, _ in self.seen.values()])
        summary: dict[str, Any] = {
            "entries": total,
            "structure": structure,
            **({"within": within} if within else {}),
            "asked": sum(budget.k for budget in plan),
            "chosen": count,
            "density": count / total,
            "near_zero_share": (chosen_weights < NEAR_ZERO).double().mean().item(),
            "near_zero_share_of_all": (mass[all_weights < NEAR_ZERO].sum() / mass.sum()).item(),
            "abs_weight": {"chosen": quantiles(thinned(chosen_weights)), "all": quantiles(all_weights, mass)},
            "weights": {
                name: {"shape": list(weight.shape), "chosen": len(indices.get(name, ())),
                       "share": len(indices.get(name, ())) / weight.numel()}
                for name, weight in weights.items()
            },
        }  # fmt: skip
        if gradients:
            all_gradients = torch.cat([seen for _, seen in self.seen.values() if seen is not None])
            chosen_gradients = torch.cat([gradients[name] for name in indices]).float()
            summary["abs_gradient"] = {
                "chosen": quantiles(thinned(chosen_gradients)),
                "all": quantiles(all_gradients, mass),
            }
        return summary


def at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Entries at flat positions, as float32 on the CPU."""
    return float_values(distributed.whole(tensor)).reshape(-1)[positions.to(tensor.device)].float().cpu()


def _mass(weight: Tensor, samples: int) -> Tensor:
    """How many entries each sampled one stands for."""
    return torch.full((samples,), weight.numel() / samples, dtype=torch.float64)


def thinned(values: Tensor) -> Tensor:
    """At most `MOST` of the values, evenly spaced: sorting all of them would take longer than choosing."""
    return values[:: -(-len(values) // MOST)] if len(values) > MOST else values


def quantiles(values: Tensor, mass: Tensor | None = None) -> dict[str, float]:
    """Weighted quantiles, by name: {"0.5": median, ..}. values: (n,); mass: (n,) or None for equal mass."""
    ordered, order = values.double().sort()
    mass = torch.ones_like(ordered) if mass is None else mass[order]
    reached = mass.cumsum(0) / mass.sum()
    places = torch.searchsorted(reached, torch.tensor(QUANTILES, dtype=torch.float64)).clamp(max=len(values) - 1)
    return {str(q): ordered[place].item() for q, place in zip(QUANTILES, places, strict=True)}
