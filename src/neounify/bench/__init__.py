"""Public benchmarks: prompts and layouts as data, runs in shards, judges, results and comparisons.

`adapter` and `cases` describe a benchmark, `generation` and `editing` are the table of them,
`questions` and `answers` sets of questions and their metrics; `subjects` are models under test,
`runner` makes their outputs, `scoring` judges them, `official` reads what official scorers said,
`result` and `comparison` say what came out.
"""

from neounify.bench import editing, generation
from neounify.bench.adapter import Adapter
from neounify.bench.answers import METRICS
from neounify.bench.cases import BenchError, Case, PromptFiles
from neounify.bench.comparison import Comparison, compare
from neounify.bench.official import read_results
from neounify.bench.questions import QUESTIONS, question_cases
from neounify.bench.result import CaseScore, Result
from neounify.bench.runner import Plan, Summary, begin, load_about, load_cases, run
from neounify.bench.scoring import judge, score_answers
from neounify.bench.subjects import Endpoint, Job, LocalSubject, Subject

ADAPTERS = {item.name: item for item in (*generation.ADAPTERS, *editing.ADAPTERS, QUESTIONS)}
"""Benchmarks by name."""

__all__ = [
    "ADAPTERS",
    "METRICS",
    "Adapter",
    "BenchError",
    "Case",
    "CaseScore",
    "Comparison",
    "Endpoint",
    "Job",
    "LocalSubject",
    "Plan",
    "PromptFiles",
    "Result",
    "Subject",
    "Summary",
    "begin",
    "compare",
    "judge",
    "load_about",
    "load_cases",
    "question_cases",
    "read_results",
    "run",
    "score_answers",
]
