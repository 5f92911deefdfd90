"""Does it really forget? Scenarios × methods × seeds, against models retrained without the forget set.

    python -m bench.quality --plan            what there is to do, and what it will cost
    python -m bench.quality --hours 1.5       do it; a run again does only what is missing
    python bench/report.py                    tables and pictures from what is committed

`docs/quality.md` says what is compared with what, why that is fair, and what came out.
"""
