import pytest

pytest.register_assert_rewrite("contract.communicators", "contract.exchanges", "contract.reducers")
