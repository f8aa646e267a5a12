"""An emulated Modal, for the SDK as it is: ``MODAL_SERVER_URL`` points it here.

Read in the SDK (modal 1.6.4, and the service definitions `modal_proto.api_grpc` and `task_command_router_grpc` that
come with it): what is asked, in what order, and what the SDK makes of each answer. What it does not tell is emulated at
its worst: a stream stays open while anything holds it, only the leader is killed when an exec's time is up, an exec
shares its session with everything else, stdin is taken no faster than it is read, output that nobody reads stops the
command after 64 MiB. Sandboxes with a GPU use other calls (V1), which are not here, and no network is restricted: what
was asked for is in `Emulator.definitions`.
"""

from tests.emulators.modal.server import Emulator

__all__ = ["Emulator"]
