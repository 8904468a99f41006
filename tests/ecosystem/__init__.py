"""Programs of others that pin versions which the environment of the tests cannot hold: `make test-ecosystem`."""
