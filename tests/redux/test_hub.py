"""A store that is away is told apart from a URL that is wrong."""

import errno

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from redux.hub import explain_error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:9"), OSError),
        (TimeoutError("no answer"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (NoCredentialsError(), ValueError),
        (FileNotFoundError("bucket/model"), ValueError),
        (PermissionError("Access Denied"), ValueError),
        (ImportError("Install s3fs to access S3"), ValueError),
    ],
)
def test_only_what_the_same_url_meets_again_is_a_mistake(error: Exception, kind: type[Exception]) -> None:
    told = explain_error(error, "model: got s3://bucket/model", "a folder that can be read")
    assert type(told) is kind
    assert str(told).startswith("model: got s3://bucket/model")
    assert str(told).endswith(f"{type(error).__name__}: {error}")
