"""The command; see :mod:`fastbandit.report`."""

from fastbandit import _start

if __name__ == "__main__":
    _start.begin()  # before torch is loaded

    from fastbandit.report.command import main

    raise SystemExit(main())
