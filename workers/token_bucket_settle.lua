-- Settle a batch of permits of one pool: correct the slot of admission and the bucket level, end the lease.
-- A permit without a receipt was settled before or outlived its lease: nothing happens, so repeating is safe.
--
-- KEYS  state hash, slot hash, lease zset, receipt hash          (one hash tag)
-- ARGV  1 ttl (ms), 2 permits, permits * (permit id, pairs (-1 = never sent, give everything back), pairs * (name, actual))
-- Reply number of permits settled now
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local STATE, SLOTS, LEASES, RECEIPTS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ttl, npermits = ARGV[1], tonumber(ARGV[2])

local function int(x) return string.format('%.0f', x) end

local dims = {}
local function dimension(id)
  if dims[id] == nil then
    local record = redis.call('HGET', STATE, 'd:' .. id)
    dims[id] = false
    if record then
      local level, at, sum, first, tail, cap, rate = string.match(record, '^(.-)|(.-)|(.-)|(.-)|(.-)|(.-)|(.-)$')
      dims[id] = {
        level = tonumber(level), at = tonumber(at), sum = tonumber(sum), first = tonumber(first), tail = tail,
        cap = tonumber(cap), rate = tonumber(rate)
      }
    end
  end
  return dims[id]
end

local function correct(id, e, diff)
  local d = dimension(id)
  if not d or diff == 0 then return end
  if now > d.at then
    d.level = math.min(d.cap, d.level + (now - d.at) * d.rate)
    d.at = now
  end
  -- May fall below zero: later requests wait the debt out.
  d.level = math.min(d.cap, d.level + diff)
  if e >= d.first then
    redis.call('HINCRBY', SLOTS, id .. ':' .. int(e), int(-diff))
    d.sum = d.sum - diff
  end
  d.dirty = true
end

local settled, arg = 0, 3
for _ = 1, npermits do
  local permit, pairs_count = ARGV[arg], tonumber(ARGV[arg + 1])
  local actual = {}
  arg = arg + 2
  for _ = 1, math.max(0, pairs_count) do
    actual[ARGV[arg]] = tonumber(ARGV[arg + 1])
    arg = arg + 2
  end
  local receipt = redis.call('HGET', RECEIPTS, permit)
  redis.call('ZREM', LEASES, permit)
  if receipt then
    redis.call('HDEL', RECEIPTS, permit)
    settled = settled + 1
    for id, e, cost in string.gmatch(receipt, '([^;,]+),([^;,]+),([^;,]+);') do
      local real = actual[string.match(id, '^[^@]+')]
      if pairs_count < 0 then real = 0 end
      if real then correct(id, tonumber(e), tonumber(cost) - real) end
    end
  end
end

for id, d in pairs(dims) do
  if d and d.dirty then
    redis.call('HSET', STATE, 'd:' .. id, string.format('%.17g|%.0f|%.0f|%.0f|%s|%.17g|%.17g', d.level, d.at, d.sum, d.first,
      d.tail, d.cap, d.rate))
  end
end
for k = 1, 4 do redis.call('PEXPIRE', KEYS[k], ttl) end
return settled
