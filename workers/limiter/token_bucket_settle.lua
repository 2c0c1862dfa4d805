-- Settle a batch of permits of one pool: correct the slot of admission and the bucket level, end the lease, and adopt what
-- the provider said it has left. A permit without a receipt was settled before or outlived its lease: nothing happens, so
-- repeating is safe.
--
-- KEYS  state hash, slot hash, lease zset, receipt hash; then state, slots, leases of each wider pool (one hash tag)
-- ARGV  1 ttl (ms), 2 permits,
--       permits * (permit id, pairs (-1 = never sent, give everything back), pairs * (name, actual),
--                  sightings, sightings * (pool/name, our units, limit, remaining, us until full; -1 = not told))
-- Reply number of permits settled now
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local RECEIPTS = KEYS[4]
local ttl, npermits = ARGV[1], tonumber(ARGV[2])
-- As in `workers.limiter.terms`.
local SLOTS_PER_WINDOW = 600

local function int(x) return string.format('%.0f', x) end

-- Keys of the pool at a place of the request: the first one has a key of receipts behind its own three.
local function key(place, which)
  return KEYS[(place == 1 and 0 or 4 + (place - 2) * 3) + which]
end

local dims = {}
local function dimension(name)
  if dims[name] == nil then
    local place, id = string.match(name, '^(%d+)/(.*)$')
    place = tonumber(place)
    local state = key(place, 1)
    local record = state and redis.call('HGET', state, 'd:' .. id)
    dims[name] = false
    if record then
      local level, at, sum, first, tail, cap, rate = string.match(record, '^(.-)|(.-)|(.-)|(.-)|(.-)|(.-)|(.-)$')
      dims[name] = {
        id = id, name = string.match(id, '^[^@]+'), seen = string.match(name, '^[^@]+'), STATE = state, SLOTS = key(place, 2),
        level = tonumber(level), at = tonumber(at), sum = tonumber(sum),
        first = tonumber(first), tail = tonumber(tail), cap = tonumber(cap), rate = tonumber(rate)
      }
      dims[name].window = tonumber(string.match(id, '@(.*)$'))
      dims[name].q = math.max(1, math.ceil(dims[name].window / SLOTS_PER_WINDOW))
    elseif state and redis.call('EXISTS', key(place, 2)) == 1 then
      -- A calendar has no level, only its days.
      dims[name] = { id = id, name = string.match(id, '^[^@]+'), SLOTS = key(place, 2), days = true }
    end
  end
  return dims[name]
end

local function refill(d)
  if now > d.at then
    d.level = math.min(d.cap, d.level + (now - d.at) * d.rate)
    d.at = now
  end
end

-- The level as the slots tell it, to which requests that were due and never left have been given back: adding them up would
-- not do, because the provider's own bucket was full meanwhile and gained less than they cost. Units count at the end of
-- their slot, which is never too good.
local function replay(d)
  local level, at = d.cap, d.first * d.q
  for from = d.first, d.tail, 100 do
    local names = {}
    for e = from, math.min(from + 99, d.tail) do names[#names + 1] = d.id .. ':' .. int(e) end
    for k, units in ipairs(redis.call('HMGET', d.SLOTS, unpack(names))) do
      local ends = math.max(at, math.min((from + k) * d.q, d.at))
      level = math.min(d.cap, level + (ends - at) * d.rate) - tonumber(units or '0')
      at = ends
    end
  end
  level = math.min(d.cap, level + math.max(0, d.at - at) * d.rate)
  d.level = math.max(d.level, math.min(level, d.level + d.unsent))
end

local function correct(d, e, diff, is_late)
  if diff == 0 then return end
  if d.days then
    redis.call('HINCRBY', d.SLOTS, d.id .. ':' .. int(e), int(-diff))
    return
  end
  refill(d)
  if is_late then
    d.unsent = (d.unsent or 0) + diff
  else
    -- May fall below zero: later requests wait the debt out.
    d.level = math.min(d.cap, d.level + diff)
  end
  if e >= d.first then
    redis.call('HINCRBY', d.SLOTS, d.id .. ':' .. int(e), int(-diff))
    d.sum = d.sum - diff
  end
  d.dirty = true
end

-- The provider counted this request and told what it had left then. Only tightens. Answers older than the newest one heard,
-- or sent before the last correction, say nothing new.
local function adopt(d, sent, sum, level, units, limit, remaining, full_us)
  if not d.heard then
    local seen = redis.call('HGET', d.STATE, 'a:' .. d.id)
    local heard, corrected = string.match(seen or '0|0', '^(.-)|(.-)$')
    d.heard, d.corrected = tonumber(heard), tonumber(corrected)
  end
  if sent < d.heard then return end
  d.heard = sent
  if limit >= 0 then
    d.limit = math.max(1, limit)
    units = math.min(units, d.limit)
  end
  if remaining < 0 or sent <= d.corrected then return end
  local missing, e = units - sum - remaining, math.floor(now / d.q)
  if full_us < 0 then
    -- A provider with a small bucket never has much left and soon has it again, and it does not say when: only what we
    -- would send at once counts, and what is taken off it comes back at the pace of the limit.
    missing = math.min(missing, level - remaining)
    if missing > 0 then d.level, d.corrected, d.dirty = d.level - missing, now, true end
    return
  end
  if full_us < 2 * d.q then return end
  -- It lasts until the provider has everything again: counted as if it had been sent a window before that moment.
  e = math.min(e, math.floor((now + full_us - d.window) / d.q))
  if missing <= 0 or (e + 1) * d.q + d.window <= now then return end
  if d.first > d.tail then d.first, d.tail, d.sum = e, e, 0 end
  d.first, d.tail = math.min(d.first, e), math.max(d.tail, e)
  redis.call('HINCRBY', d.SLOTS, d.id .. ':' .. int(e), int(missing))
  d.sum, d.corrected, d.dirty = d.sum + missing, now, true
end

local settled, arg, leases = 0, 3, {}
while key(#leases + 1, 3) do leases[#leases + 1] = key(#leases + 1, 3) end
for _ = 1, npermits do
  local permit, pairs_count = ARGV[arg], tonumber(ARGV[arg + 1])
  local actual, sightings = {}, {}
  arg = arg + 2
  for _ = 1, math.max(0, pairs_count) do
    actual[ARGV[arg]] = tonumber(ARGV[arg + 1])
    arg = arg + 2
  end
  local told = tonumber(ARGV[arg])
  arg = arg + 1
  for _ = 1, told do
    local numbers = {}
    for k = 1, 4 do numbers[k] = tonumber(ARGV[arg + k]) end
    sightings[ARGV[arg]] = numbers
    arg = arg + 5
  end
  local receipt = redis.call('HGET', RECEIPTS, permit)
  for k = 1, #leases do redis.call('ZREM', leases[k], permit) end
  if receipt then
    redis.call('HDEL', RECEIPTS, permit)
    settled = settled + 1
    local sent = tonumber(string.match(receipt, '^[^;]+'))
    for id, e, cost, sum, level in string.gmatch(receipt, '([^;,]+),([^;,]+),([^;,]+),([^;,]+),([^;,]+);') do
      local d = dims[id]
      if d == nil then d = dimension(id) end
      if d then
        local real = actual[d.name]
        if pairs_count < 0 then real = 0 end
        if real then correct(d, tonumber(e), tonumber(cost) - real, pairs_count < 0 and sent < now) end
        local seen = told > 0 and d.seen and sightings[d.seen]
        if seen then adopt(d, sent, tonumber(sum), tonumber(level), unpack(seen)) end
      end
    end
  end
end

for _, d in pairs(dims) do
  if d and d.unsent then replay(d) end
  if d and d.dirty then
    redis.call('HSET', d.STATE, 'd:' .. d.id, string.format('%.17g|%.0f|%.0f|%.0f|%.0f|%.17g|%.17g', d.level, d.at, d.sum,
      d.first, d.tail, d.cap, d.rate))
  end
  if d and d.heard then
    redis.call('HSET', d.STATE, 'a:' .. d.id, int(d.heard) .. '|' .. int(d.corrected))
    if d.limit then redis.call('HSET', d.STATE, 'l:' .. d.name, int(d.limit)) end
  end
end
for k = 1, #KEYS do redis.call('PEXPIRE', KEYS[k], ttl) end
return settled
