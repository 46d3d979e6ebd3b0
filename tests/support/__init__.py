"""Helpers of the tests: models, data, servers, recordings; imported as `support.NAME`."""
