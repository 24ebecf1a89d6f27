from __future__ import annotations

import threading

from moe_local.offload.store.stalls import StallAccount


class SlowAnswer:
    """A wait of a device, which tells how long it was while another thread charges a second to the same."""

    def __init__(self, account: StallAccount) -> None:
        self._account = account

    def seconds(self) -> float:
        other = threading.Thread(target=self._account.add_stall, args=("demand", 1.0))
        other.start()
        other.join()
        return 2.0


def test_nothing_is_lost_that_is_charged_while_a_device_is_asked() -> None:
    account = StallAccount()
    account.add_wait("demand", SlowAnswer(account))
    assert account.by_cause().demand == account.total() == 3.0
