"""The checks: small pure functions from measurements to a finding."""
