"""Constrained decoding: answers that follow a JSON schema or are calls of functions.

llguidance computes which tokens may come next; this package bounds the schemas it is given and
makes constraints of them. Needs the extra `grammar` (the extra `serve` has it too).
"""

from neounify.grammar.build import Grammar, calls_grammar, json_grammar
from neounify.grammar.schema import check_schema
from neounify.grammar.vocabulary import Vocabulary

__all__ = ["Grammar", "Vocabulary", "calls_grammar", "check_schema", "json_grammar"]
