"""Does a language model forget people who do not exist? A benchmark in the manner of TOFU that needs no network.

    python -m bench.llm --model tiny                        the plumbing, in a minute
    python -m bench.llm --model smollm2 --plan              what there is to do, and what it will cost
    python -m bench.llm --model smollm2 --hours 1           do it; a run again does only what is missing
    python bench/report.py                                  the tables, from what is committed

`docs/llm-forgetting.md` says what is compared with what, and what came out.
"""
