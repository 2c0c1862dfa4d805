from collections import Counter
from collections.abc import Set as AbstractSet

total_count: Counter[str]
active_requests: AbstractSet[object]
