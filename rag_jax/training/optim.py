"""Learning-rate schedules, AdamW, and rules by path for rate, decay and freezing.

Rules are (regex, multiplier) pairs; the first whose regex is found in the parameter's path, such as
`generator/layers/attention/query/kernel`, holds, and every parameter must be covered.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rag_jax.config import Rules
from rag_jax.errors import UserError
from rag_jax.models import adapters

# The rate at which the polynomial schedule ends, as in PyTorch's.
POLYNOMIAL_END = 1e-7

Schedule = Callable[[Any], jax.Array]


def learning_rate(section: Any, total_steps: int) -> Schedule:
    """The rate of update `step` (from 0), by the config's `optimizer` section.

    Shapes as in `transformers.get_scheduler`, except that warm-up counts from 1, so that the first update is never
    wasted on a rate of 0. "constant" has no warm-up; "cosine_with_restarts" has, as there, a single cycle.
    """
    peak, warmup = section.learning_rate, section.warmup_steps
    end = min(POLYNOMIAL_END / peak, 1.0)
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
        "cosine_with_restarts": lambda x: jnp.where(x >= 1, 0.0, 0.5 * (1 + jnp.cos(jnp.pi * (x % 1.0)))),
        "polynomial": lambda x: end + (1 - end) * (1 - x),
        "constant": jnp.ones_like,
        "constant_with_warmup": jnp.ones_like,
    }
    shape = shapes[section.schedule]
    if section.schedule == "constant":
        warmup = 0

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        return peak * jnp.where(step < warmup, (step + 1) / max(1, warmup), shape(progress))

    return rate


def make_optimizer(section: Any, total_steps: int, params: Any) -> optax.GradientTransformation:
    """AdamW by the config's `optimizer` section for these parameters (arrays or shapes; None leaves are left out).

    Clipping comes first, of each model by its own norm; a path's multipliers act on its rate (the decay included, as
    decay is multiplied by the rate) and on its weight decay.
    """
    parts = [] if section.clip_norm is None else [clip_each(section.clip_norm)]
    parts.append(optax.scale_by_adam())
    if section.weight_decay:
        decays = multipliers(params, section.decay_rules, "optimizer.decay_rules")
        decays = jax.tree.map(lambda m: m * section.weight_decay, decays)
        parts.append(optax.stateless(lambda updates, p: jax.tree.map(lambda u, a, d: u + d * a, updates, p, decays)))
    rates = multipliers(params, section.rate_rules, "optimizer.rate_rules")
    if any(rate != 1.0 for rate in jax.tree.leaves(rates)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: u * r, updates, rates)))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate(section, total_steps)))


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradients of each model down to `max_norm`, on its own.

    Under one norm for both, how much a step counts for the retriever would hang on the generator's gradients, even
    where no loss joins the two.
    """
    clip = optax.clip_by_global_norm(max_norm)

    def clip_models(updates: Any, _: Any) -> dict[str, Any]:
        return {role: clip.update(grads, optax.EmptyState())[0] for role, grads in updates.items()}

    return optax.stateless(clip_models)


def updates_done(opt_state: Any) -> jax.Array:
    """How many updates the optimizer has made: steps less those that were skipped. Int32, shape ().

    It is the count that the learning rate is a function of. ValueError unless there is exactly one such.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    schedules = [node for node in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(node)]
    if len(schedules) != 1:
        raise ValueError(f"the optimizer has {len(schedules)} schedules, so its updates cannot be told from a count")
    return schedules[0].count


def multipliers(params: Any, rules: Rules, key: str = "rules") -> Any:
    """The multiplier of every parameter, first match wins; UserError lists the paths that no rule covers."""
    uncovered: list[str] = []

    def find(path: str) -> float:
        for pattern, multiplier in rules:
            if re.search(pattern, path):
                return multiplier
        uncovered.append(path)
        return 0.0

    tree = by_path(params, find)
    if uncovered:
        raise UserError(f"{key}: no rule covers {', '.join(uncovered)}; end with ('.*', 1.0)")
    return tree


def with_adapters(rules: Rules, params: Any) -> Rules:
    """The rules for models of which some have adapters: a rule that covers an adapter leaves what it is of as it is.

    So the rules mean adapters wherever they do not name something else alone, such as norms: `("norm/", 1.0)`.
    """
    for role, tree in params.items():
        leaves = jax.tree_util.tree_leaves_with_path({role: tree})
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        own = [path for path in paths if adapters.is_adapter(path)]
        first = next((i for i, (rule, _) in enumerate(rules) if any(re.search(rule, path) for path in own)), len(rules))
        if own:
            rules = (*rules[:first], (rf"^{role}/(?!.*/({'|'.join(adapters.LEAVES)})$)", 0.0), *rules[first:])
    return rules


def by_path(tree: Any, fn: Callable[[str], Any]) -> Any:
    """`fn` of every leaf's path, such as generator/layers/attention/query/kernel."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: fn(name(path)), tree)


def split_frozen(params: Any, rules: Rules) -> tuple[Any, Any]:
    """(trainable, frozen): the same tree twice, None in each for the other's leaves. Frozen: a multiplier of 0."""
    rates = multipliers(params, rules, "optimizer.rate_rules")
    if not any(jax.tree.leaves(rates)):
        raise UserError(f"optimizer.rate_rules={rules}: every parameter is frozen; give one a multiplier above 0")
    trainable = jax.tree.map(lambda a, rate: a if rate else None, params, rates)
    frozen = jax.tree.map(lambda a, rate: None if rate else a, params, rates)
    return trainable, frozen


def borrowed(frozen: Any) -> Any:
    """The frozen leaves of two models of one base: those of the retriever that the generator has too are held once."""

    def leaf(path: Any, value: Any) -> Any:
        return None if _at(frozen["generator"], path) is not None else value

    return frozen | {"retriever": jax.tree_util.tree_map_with_path(leaf, frozen["retriever"])}


def join(trainable: Any, frozen: Any) -> Any:
    """The whole tree again; inverse of `split_frozen`, and of `borrowed`: what neither has of the retriever is the
    generator's."""
    is_none = lambda leaf: leaf is None  # noqa: E731
    tree = jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=is_none)
    if not isinstance(tree, dict) or not {"retriever", "generator"} <= tree.keys():
        return tree

    def leaf(path: Any, value: Any) -> Any:
        return _at(tree["generator"], path) if value is None else value

    return tree | {"retriever": jax.tree_util.tree_map_with_path(leaf, tree["retriever"], is_leaf=is_none)}


def _at(tree: Any, path: Any) -> Any:
    """The leaf at a path of `jax.tree_util`; None where there is none."""
    for key in path:
        if not isinstance(tree, dict) or key.key not in tree:
            return None
        tree = tree[key.key]
    return tree
