-- Reserve send times for a batch of requests of one pool: all dimensions at once, in order, by virtual scheduling.
--
-- Two gates per dimension. Pacing bucket: level `cap`, refilled with `rate` units per microsecond. Sliding window:
-- what was admitted in slot e (q microseconds wide) counts until (e+1)*q + window. Both gates are of the kind "not
-- before some moment", because nothing is ever scheduled after the pool's last grant; so the earliest common send
-- time is simply the latest of them. A request whose time lies beyond the horizon changes nothing.
--
-- KEYS  state hash, slot hash, lease zset, receipt hash          (one hash tag)
-- ARGV  1 incarnation known, 2 last send time known (us), 3 longest horizon (us), 4 max concurrent (0 = off),
--       5 ttl (ms), 6 asker, 7 starved (0/1), 8 dimensions, 9 requests,
--       dimensions * (id, units, window us, slot us, cap, rate),
--       requests * (permit id, lease us, horizon us, cost per dimension)
-- Reply {status, now, incarnation, not-before, last, wait us, reason, "time:reason;..." of the granted ones}
--       status: ok | refused (the first one not granted) | lost (state vanished: restore your leases, ask again)
-- Numbers are written with explicit formats: Lua's own tostring keeps 14 digits, a microsecond epoch needs 16.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local STATE, SLOTS, LEASES, RECEIPTS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known, known_last, horizon = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local max_concurrent, ttl, asker, starved = tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7] == '1'
local ndims, nreqs = tonumber(ARGV[8]), tonumber(ARGV[9])
local CHUNK = 64
-- A grant further ahead than any horizon: the server's clock stepped back, the old moments mean nothing any more.
local CLOCK_STEP = 120000000

local function int(x) return string.format('%.0f', x) end

local head = redis.call('HMGET', STATE, 'inc', 'last', 'nb', 'lost', 'why', 'claim')
local incarnation, last = head[1], tonumber(head[2] or '0')
local not_before, why_last = tonumber(head[3] or '0'), head[5] or ''
if incarnation and last > now + CLOCK_STEP then
  redis.call('UNLINK', STATE, SLOTS)
  head, incarnation, last, not_before, known = {}, false, 0, 0, known ~= '' and known or incarnation
end
if not incarnation then
  incarnation = int(now)
  redis.call('HSET', STATE, 'inc', incarnation)
  redis.call('PEXPIRE', STATE, ttl)
end
if known ~= '' and known ~= incarnation then
  -- Somebody remembers a state that is gone (flush, restart without persistence). What other processes were granted
  -- lies within the horizon, so the next grant lies beyond it; and pacing starts from empty there, because a full
  -- bucket would add a second burst to the window that the provider still remembers.
  last = math.max(last, math.min(known_last, now + horizon))
  if tonumber(head[4] or '0') == 0 then
    last = math.max(last, now + horizon)
    redis.call('HSET', STATE, 'lost', int(last))
    local fields = redis.call('HGETALL', STATE)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 2) == 'd:' then
        local level, at, rest = string.match(fields[i + 1], '^(.-)|(.-)|(.*)$')
        level, at = math.min(0, tonumber(level)), math.max(last, tonumber(at))
        redis.call('HSET', STATE, fields[i], string.format('%.17g|%.0f|%s', level, at, rest))
      end
    end
  end
  redis.call('HSET', STATE, 'last', int(last))
  return {'lost', int(now), incarnation, int(not_before), int(last), 0, '', ''}
end
last = math.max(last, math.min(known_last, now + horizon))

local expired = redis.call('ZRANGEBYSCORE', LEASES, '-inf', int(now), 'LIMIT', 0, 1000)
if #expired > 0 then
  redis.call('ZREM', LEASES, unpack(expired))
  redis.call('HDEL', RECEIPTS, unpack(expired))
end
local in_flight = redis.call('ZCARD', LEASES)

local dims, arg = {}, 10
for i = 1, ndims do
  local d = {
    id = ARGV[arg], units = tonumber(ARGV[arg + 1]), window = tonumber(ARGV[arg + 2]), q = tonumber(ARGV[arg + 3]),
    cap = tonumber(ARGV[arg + 4]), rate = tonumber(ARGV[arg + 5]), seen = {}, added = {}, evicted = {}
  }
  d.name = string.match(d.id, '^[^@]+')
  local record = redis.call('HGET', STATE, 'd:' .. d.id)
  if record then
    local level, at, sum, first, tail = string.match(record, '^(.-)|(.-)|(.-)|(.-)|(.-)|')
    d.level, d.at, d.sum = math.min(d.cap, tonumber(level)), tonumber(at), tonumber(sum)
    d.first, d.tail = tonumber(first), tonumber(tail)
  else
    local lost = tonumber(head[4] or '0')
    d.level = lost > 0 and math.min(d.cap, (now - lost) * d.rate) or d.cap
    d.at, d.sum, d.first = now, 0, math.floor(now / d.q)
    d.tail = d.first - 1
  end
  d.loaded, d.stored = d.first, d.tail
  dims[i] = d
  arg = arg + 6
end

-- Units in slot e, read ahead in chunks; what this very call added is not in Redis yet.
local function slot(d, e)
  if e >= d.loaded and e <= d.stored then
    local names, first = {}, d.loaded
    for k = first, math.min(e + CHUNK, d.stored) do names[#names + 1] = d.id .. ':' .. int(k) end
    local values = redis.call('HMGET', SLOTS, unpack(names))
    for k = 1, #names do d.seen[first + k - 1] = tonumber(values[k] or '0') end
    d.loaded = first + #names
  end
  return (d.seen[e] or 0) + (d.added[e] or 0)
end

local function leaves_at(d, e) return (e + 1) * d.q + d.window end

-- The earliest moment from `at` on that both gates of `d` allow.
local function earliest(d, cost, at)
  local want = math.min(cost, d.cap)
  if d.level < want then at = math.max(at, d.at + math.ceil((want - d.level) / d.rate)) end
  local sum, e = d.sum, d.first
  while e <= d.tail and sum + cost > d.units do
    at = math.max(at, leaves_at(d, e))
    sum = sum - slot(d, e)
    e = e + 1
  end
  return at
end

local function admit(d, cost, at)
  while d.first <= d.tail and leaves_at(d, d.first) <= at do
    d.sum = d.sum - slot(d, d.first)
    d.evicted[#d.evicted + 1] = d.id .. ':' .. int(d.first)
    d.added[d.first] = nil
    d.first = d.first + 1
  end
  local e = math.floor(at / d.q)
  if d.first > d.tail then d.first, d.sum = e, 0 end
  d.tail = math.max(d.tail, e)
  d.level = math.min(d.cap, d.level + math.max(0, at - d.at) * d.rate) - cost
  d.at, d.sum = math.max(d.at, at), d.sum + cost
  d.added[e] = (d.added[e] or 0) + cost
  return d.id .. ',' .. int(e) .. ',' .. int(cost)
end

local ids, old = {}, {}
for i = 1, nreqs do ids[i] = ARGV[arg + (i - 1) * (3 + ndims)] end
if nreqs > 0 then old = redis.call('HMGET', RECEIPTS, unpack(ids)) end

local owner, owner_until, owner_at, owner_why = string.match(head[6] or '', '^(.-)|(.-)|(.-)|(.*)$')
local foreign = owner and owner ~= asker and tonumber(owner_until) > now
local status, wait, reason = 'ok', 0, ''
local granted, receipts, leases = {}, {}, {}
for i = 1, nreqs do
  local base = arg + (i - 1) * (3 + ndims)
  if old[i] then
    local at, why = string.match(old[i], '^(.-);(.-);')
    granted[#granted + 1] = at .. ':' .. why
  else
    if max_concurrent > 0 and in_flight >= max_concurrent then
      status, reason = 'refused', 'concurrency'
      break
    end
    local at, why = now, ''
    if not_before > at then at, why = not_before, 'not_before' end
    if last > at then at, why = last, why_last end
    for k = 1, ndims do
      local t = earliest(dims[k], tonumber(ARGV[base + 2 + k]), at)
      if t > at then at, why = t, dims[k].name end
    end
    if foreign or at > now + tonumber(ARGV[base + 2]) then
      status, wait, reason = 'refused', at - now, why
      if foreign then
        wait, reason = math.max(wait, tonumber(owner_at) - now), owner_why
      elseif starved then
        -- Smaller requests of other processes would keep this one out for ever: the pool waits for it now.
        redis.call('HSET', STATE, 'claim', asker .. '|' .. int(now + 1500000) .. '|' .. int(at) .. '|' .. why)
        redis.call('PEXPIRE', STATE, ttl)
      end
      break
    end
    local parts = {int(at), why}
    for k = 1, ndims do parts[2 + k] = admit(dims[k], tonumber(ARGV[base + 2 + k]), at) end
    last, why_last, in_flight = at, why, in_flight + 1
    granted[#granted + 1] = int(at) .. ':' .. why
    receipts[#receipts + 1] = ids[i]
    receipts[#receipts + 1] = table.concat(parts, ';') .. ';'
    leases[#leases + 1] = int(at + tonumber(ARGV[base + 1]))
    leases[#leases + 1] = ids[i]
  end
end

if #receipts > 0 then
  local fields = {'last', int(last), 'why', why_last}
  for _, d in ipairs(dims) do
    fields[#fields + 1] = 'd:' .. d.id
    fields[#fields + 1] = string.format('%.17g|%.0f|%.0f|%.0f|%.0f|%.17g|%.17g', d.level, d.at, d.sum, d.first, d.tail,
      d.cap, d.rate)
    for from = 1, #d.evicted, 1000 do
      redis.call('HDEL', SLOTS, unpack(d.evicted, from, math.min(from + 999, #d.evicted)))
    end
    for e, units in pairs(d.added) do redis.call('HINCRBY', SLOTS, d.id .. ':' .. int(e), int(units)) end
  end
  redis.call('HSET', STATE, unpack(fields))
  redis.call('ZADD', LEASES, unpack(leases))
  redis.call('HSET', RECEIPTS, unpack(receipts))
  if owner == asker then redis.call('HDEL', STATE, 'claim') end
  for k = 1, 4 do redis.call('PEXPIRE', KEYS[k], ttl) end
end
return {status, int(now), incarnation, int(not_before), int(last), int(wait), reason, table.concat(granted, ';')}
