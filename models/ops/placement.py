"""Which sites an operator replaces: its own choice, narrowed or replaced by the fields `include` and `exclude`."""

from collections.abc import Callable

from ..sites import Site, Sites
from .patterns import check_patterns, matches


def choose(
    sites: Sites,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...],
    *,
    kinds: tuple[str, ...],
    placed: Callable[[Site], bool],
) -> tuple[list[Site], tuple[tuple[str, str], ...]]:
    """The sites to replace, in their order, and those that are left though they have a place, with the reason.

    Args:
        sites: All there are.
        include: Regular expressions over whole names, in place of `placed`; None takes that.
        exclude: Regular expressions over whole names that stay static.
        kinds: Classes of torch.nn that the operator replaces.
        placed: Whether the operator's paper replaces a layer of this role.

    Raises:
        ValueError: A pattern that matches nothing, a layer that cannot be replaced, or nothing to replace.
    """
    names = [site.name for site in sites]
    check_patterns("exclude", exclude, names)
    if include is None:
        found = [site for site in sites if site.kind in kinds and placed(site)]
    else:
        check_patterns("include", include, names)
        found = [site for site in sites if matches(include, site.name)]
    found = [site for site in found if not matches(exclude, site.name)]
    for site in found:
        if site.kind not in kinds:
            raise ValueError(f"include names {site.name}, a {site.kind}: there is a form for {', '.join(kinds)} only")
    left = tuple((site.name, site.foreign) for site in found if site.foreign) if include is None else ()
    chosen = [site for site in found if include is not None or not site.foreign]
    if not chosen:
        raise ValueError(f"nothing to convert: include and exclude leave none of {len(names)} layers")
    for site in chosen:
        check_site(site)
    return chosen, left


def check_site(site: Site) -> None:
    """Raise a ValueError for a layer that cannot be replaced by one with a kernel for each sample."""
    if site.obstacle:
        raise ValueError(site.obstacle)
    if site.foreign:
        raise ValueError(f"{site.name} cannot be converted: {site.foreign}; exclude it")
    if site.repeats == 0:
        raise ValueError(
            f"{site.name} reads an input whose first dimension is not the batch ({site.input_shape} with the example), "
            "and would mix one kernel for parts of several samples: use batch_first=True in the network, or exclude it"
        )
    if site.repeats is None:
        raise ValueError(
            f"{site.name} is a linear layer, and whether the first dimension of its input is the batch could not be "
            "found out: pass example_input"
        )
