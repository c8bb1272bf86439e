"""Optional libraries: ask for them before the work, not after it."""

from __future__ import annotations

from importlib.util import find_spec


def needs_for_report() -> None:
    """See that a report could be written.

    Raises:
        BackendError: naming what is not installed.
    """
    missing = [name for name in ("matplotlib", "pyarrow") if find_spec(name) is None]
    if missing:
        from moesaic.core.errors import BackendError

        raise BackendError(
            f"A report needs matplotlib and pyarrow, got no {' and no '.join(missing)}. "
            "Install them with: pip install 'moesaic[report,data]', or leave the report out with --no-report."
        )
