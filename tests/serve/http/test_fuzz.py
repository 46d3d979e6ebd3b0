"""Schemathesis against the whole API: whatever comes, the server never fails."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from neounify.serve.http import HttpConfig, create_app
from support.scripted_service import Scripted

app = create_app(Scripted(), HttpConfig())
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_but_answers_and_refusals(case: schemathesis.Case) -> None:
    response = case.call()
    if response.status_code == 504:  # of a deadline of next to nothing
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert isinstance(case.body, dict)
        assert float(str(case.body["deadline"])) < 1
    else:
        case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
