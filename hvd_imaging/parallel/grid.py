"""The grid of ranks: which of them share a volume (spatial groups), and which have volumes of their own. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ParallelConfig
from ..errors import ConfigError, on_all_ranks


@dataclass(frozen=True)
class Grid:
    """``data`` x ``spatial`` ranks. Neighbouring ranks share a volume: what they exchange most stays inside a node.

    Attributes:
        data: spatial groups, each with its own part of every global batch.
        spatial: ranks of a group, each with a slab of the group's volumes.
    """

    data: int = 1
    spatial: int = 1

    @property
    def size(self) -> int:
        """World size."""
        return self.data * self.spatial

    def place(self, rank: int) -> tuple[int, int]:
        """(data index, spatial index) of a rank."""
        return divmod(rank, self.spatial)

    def groups(self) -> list[list[int]]:
        """The ranks of every spatial group, in order of depth."""
        return [list(range(at * self.spatial, (at + 1) * self.spatial)) for at in range(self.data)]


def make_grid(parallel: ParallelConfig, size: int, spatial: int) -> Grid:
    """The grid that a configuration asks for.

    Args:
        parallel: of the run.
        size: world size.
        spatial: ranks to a volume: ``parallel.spatial``, or what ``auto`` has come to.

    Raises:
        ConfigError: the ranks that were started do not fill it.
    """
    if size % spatial:
        near = sorted({n for n in (size // spatial * spatial, -(-size // spatial) * spatial) if n})
        raise on_all_ranks(ConfigError(
            f"parallel.spatial={spatial}: {size} rank{'s' * (size > 1)} cannot be cut into groups of {spatial}; start "
            f"{' or '.join(map(str, near))} ranks (mpirun -np), or take a number that divides {size}"
        ))  # fmt: skip
    if parallel.data is not None and parallel.data * spatial != size:
        raise on_all_ranks(ConfigError(
            f"parallel.data={parallel.data} x parallel.spatial={spatial} makes {parallel.data * spatial} ranks, found {size}; start as many, or "
            "leave out parallel.data"
        ))  # fmt: skip
    return Grid(size // spatial, spatial)


def check_grid(grid: Grid, depth: int, data_only: list[str]) -> None:
    """Refuse what a split volume does not go together with.

    Args:
        grid: of the run.
        depth: of ``data.patch``.
        data_only: settings in use that need whole volumes on each rank.

    Raises:
        ConfigError: naming them.
    """
    if grid.spatial == 1:
        return
    if data_only:
        raise ConfigError(
            f"parallel.spatial={grid.spatial}: does not go together with {', '.join(data_only)}, which wants whole volumes on each rank; "
            "take parallel.spatial=1, or leave it out"
        )
    if depth < 2:
        raise ConfigError(
            f"parallel.spatial={grid.spatial}: a depth of {depth} (data.patch) cannot be split; 2D networks take parallel.dense=sharded, or "
            "plain data parallelism"
        )
