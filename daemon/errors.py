"""Every error that a user can see, with its HTTP meaning.

QuantdError
├── ConfigError                 a configuration file or flag is wrong          (exit 2)
├── RequestError                the caller can mend it                         400
│   ├── ContextLengthExceeded   prompt (+ max_tokens) longer than the context  400
│   ├── ContentFiltered         a policy does not let the prompt pass          400
│   ├── ModelNotFound                                                          404
│   ├── NotFound                no such URL or object                          404
│   ├── MethodNotAllowed                                                       405
│   ├── Unauthorized                                                           401
│   ├── Forbidden               Host, Origin or peer refused                   403
│   ├── Conflict                                                               409
│   ├── BodyTooLarge                                                           413
│   ├── QueueFull               over the queue's bound; has Retry-After        429
│   └── DeadlineExceeded        its own timeout is over; no retry              422
├── Unavailable                 loading failed, draining, worker died          503
│   ├── ModelRefused            the checkpoint is not understood; no retry     503
│   └── StoreUnavailable        the state folder cannot be used                503
├── StorageFull                 no room on the disk, or within the limit       507
├── NotServed                   a part of an API that is not served here       501
└── InternalError               our bug                                        500

`str(error)` is the message shown to the user. `param` names the request's field, in the
spelling of the API that was called. Raised anywhere; only `server/` turns them into JSON.
"""

from __future__ import annotations

from typing import ClassVar


class QuantdError(Exception):
    """Base of all errors that are shown to a user; never raised itself."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code if code is not None else type(self).code
        self.retry_after = retry_after


class ConfigError(QuantdError):
    """A configuration file, environment variable or flag is wrong."""

    code = "config_error"


class RequestError(QuantdError):
    """The request is wrong and the caller can mend it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class ContentFiltered(RequestError):
    """A policy of the safety filter has found what it blocks."""

    code = "content_filter"


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class Unauthorized(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class Conflict(RequestError):
    status = 409
    code = "conflict"


class BodyTooLarge(RequestError):
    status = 413
    code = "body_too_large"


class QueueFull(RequestError):
    """Always carries `retry_after` in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class DeadlineExceeded(RequestError):
    """The request's own `timeout` is over. Not 408 or 504: clients send those again by themselves,
    and nobody waits for the answer any more."""

    status = 422
    type = "timeout_error"
    code = "deadline_exceeded"


class Unavailable(QuantdError):
    """Not now: loading failed, the daemon drains, or the worker died."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


class ModelRefused(Unavailable):
    """The checkpoint is not understood (architecture, tensors, shapes); a retry cannot help."""

    code = "model_refused"


class StoreUnavailable(Unavailable):
    """The folder that holds files, batches and responses cannot be used; the message names it."""

    code = "store_unavailable"


class StorageFull(QuantdError):
    """The disk or the configured limit is full; a retry alone does not help."""

    status = 507
    type = "server_error"
    code = "storage_full"


class NotServed(QuantdError):
    """The URL is one of an API that is served, but what it does is not done here."""

    status = 501
    code = "not_served"


class InternalError(QuantdError):
    code = "internal_error"
