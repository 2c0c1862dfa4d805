-- Reserve send times for a batch of requests: all dimensions of all their pools at once, by virtual scheduling.
--
-- Two gates per sliding dimension. Pacing bucket: level `cap`, refilled with `rate` units per microsecond. Sliding
-- window: what was admitted in slot e (q microseconds wide) counts until (e+1)*q + window. A calendar dimension (slot
-- width 0) counts days of its own offset; near midnight a unit counts for both days. All gates are of the kind "not
-- before some moment", because nothing is ever scheduled after the last grant of a pool; so the earliest common send
-- time is simply the latest of them. A request whose time lies beyond the horizon changes nothing.
--
-- Runs share every pool by start-time fair queueing: `service` is how many seconds of the pool's capacity a run was
-- given, divided by its weight. The run with the least of the first pool is served next, and none may be far ahead, in any
-- pool, of a run of another asker that waits for that pool. A run waits for the one pool that keeps it longest: what is
-- short of its own pool must not hold others up in a wider one. A run that waits no more holds nobody up; one that comes
-- back starts at the virtual time.
--
-- KEYS  state hash, slot hash, lease zset, receipt hash; then state, slots, leases of each wider pool (one hash tag)
-- ARGV  1 longest horizon (us), 2 ttl (ms), 3 asker, 4 starved (0/1), 5 pools, 6 runs, 7 requests,
--       pools * (incarnation known, last send time known (us), day counts known, max concurrent (0 = off), dimensions,
--                dimensions * (id, units, window us, slot us, cap, rate)),
--                of a calendar: (id, units, day us, 0, offset us, guard us)
--       runs * (id, weight),
--       requests * (permit id, number of its run, lease us, horizon us, cost per dimension)
-- Reply {status, now, not-before, wait us, reason, "time:reason;..." per request (empty = not granted),
--        then per pool: incarnation, last, day counts}
--       status: ok | refused (some were not granted) | lost (state vanished: restore your leases, ask again)
-- Numbers are written with explicit formats: Lua's own tostring keeps 14 digits, a microsecond epoch needs 16.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local RECEIPTS = KEYS[4]
local horizon, ttl, asker, starved = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] == '1'
local npools, nruns, nreqs = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local CHUNK = 64
-- A grant further ahead than any horizon: the server's clock stepped back, the old moments mean nothing any more.
local CLOCK_STEP = 120000000
local MINUTE = 60000000
local RECOVERY = 0.02
-- How far (seconds of capacity) a run may be ahead of one that waits in another process, which needs time to ask.
local LEAD = 0.25

local function int(x) return string.format('%.0f', x) end

local function share_of_limits(head)
  local factor = tonumber(head[7] or '1')
  if factor >= 1 then return 1 end
  return math.min(1, factor + RECOVERY * math.floor(math.max(0, now - tonumber(head[8] or '0')) / MINUTE))
end

local arg, lost = 8, false
local pools, dims = {}, {}
for p = 1, npools do
  local key = p == 1 and 0 or 4 + (p - 2) * 3
  local pool = { STATE = KEYS[key + 1], SLOTS = KEYS[key + 2], LEASES = KEYS[key + 3], max = tonumber(ARGV[arg + 3]) }
  local known, known_last, known_days = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2]
  local head = redis.call('HMGET', pool.STATE, 'inc', 'last', 'nb', 'lost', 'why', 'claim', 'f', 'f_at', 'runs', 'v')
  local incarnation, last = head[1], tonumber(head[2] or '0')
  if incarnation and last > now + CLOCK_STEP then
    redis.call('UNLINK', pool.STATE, pool.SLOTS)
    known = known ~= '' and known or incarnation
    head, incarnation, last = {}, false, 0
  end
  if not incarnation then
    incarnation = int(now)
    redis.call('HSET', pool.STATE, 'inc', incarnation)
    redis.call('PEXPIRE', pool.STATE, ttl)
  end
  last = math.max(last, math.min(known_last, now + horizon))
  if known ~= '' and known ~= incarnation then
    -- Somebody remembers a state that is gone (flush, restart without persistence). What other processes were granted
    -- lies within the horizon, so the next grant lies beyond it; and pacing starts from empty there, because a full
    -- bucket would add a second burst to the window that the provider still remembers.
    lost = true
    if tonumber(head[4] or '0') == 0 then
      last = math.max(last, now + horizon)
      redis.call('HSET', pool.STATE, 'lost', int(last))
      local fields = redis.call('HGETALL', pool.STATE)
      for i = 1, #fields, 2 do
        if string.sub(fields[i], 1, 2) == 'd:' then
          local level, at, rest = string.match(fields[i + 1], '^(.-)|(.-)|(.*)$')
          level, at = math.min(0, tonumber(level)), math.max(last, tonumber(at))
          redis.call('HSET', pool.STATE, fields[i], string.format('%.17g|%.0f|%s', level, at, rest))
        end
      end
    end
    for field, units in string.gmatch(known_days, '([^;=]+)=([^;]+);') do
      local stored = tonumber(redis.call('HGET', pool.SLOTS, field) or '0')
      redis.call('HSET', pool.SLOTS, field, int(math.max(stored, tonumber(units))))
      redis.call('PEXPIRE', pool.SLOTS, ttl)
    end
    redis.call('HSET', pool.STATE, 'last', int(last))
  end
  pool.incarnation, pool.last, pool.head, pool.not_before = incarnation, last, head, tonumber(head[3] or '0')
  local factor = share_of_limits(head)
  local ndims = tonumber(ARGV[arg + 4])
  arg = arg + 5
  for _ = 1, ndims do
    local d = {
      id = ARGV[arg], pool = pool, place = p, units = tonumber(ARGV[arg + 1]), window = tonumber(ARGV[arg + 2]),
      q = tonumber(ARGV[arg + 3]), cap = tonumber(ARGV[arg + 4]), rate = tonumber(ARGV[arg + 5]),
      seen = {}, added = {}, evicted = {}
    }
    d.name = string.match(d.id, '^[^@]+')
    d.prefix = p .. '/' .. d.id .. ','
    d.why = p == 1 and d.name or 'shared:' .. d.name
    if d.q == 0 then
      d.offset, d.guard, d.worth = d.cap, d.rate, 0
    else
      local stored = redis.call('HMGET', pool.STATE, 'd:' .. d.id, 'l:' .. d.name)
      -- The provider's own smaller limit, and the share of it that the latest refusals leave.
      local units = math.max(1, math.floor(math.min(d.units, tonumber(stored[2] or d.units)) * factor))
      if units < d.units then d.cap, d.rate, d.units = math.min(d.cap, units), d.rate * units / d.units, units end
      if stored[1] then
        local level, at, sum, first, tail, cap = string.match(stored[1], '^(.-)|(.-)|(.-)|(.-)|(.-)|(.-)|')
        level, cap = tonumber(level), tonumber(cap)
        -- A burst that was raised is there at once, in proportion to what was left of the old one.
        if level > 0 and cap < d.cap then level = level * d.cap / cap end
        d.level, d.at, d.sum = math.min(d.cap, level), tonumber(at), tonumber(sum)
        d.first, d.tail = tonumber(first), tonumber(tail)
      else
        local since = tonumber(head[4] or '0')
        d.level = since > 0 and math.min(d.cap, (now - since) * d.rate) or d.cap
        d.at, d.sum, d.first = now, 0, math.floor(now / d.q)
        d.tail = d.first - 1
      end
      d.loaded, d.stored, d.worth = d.first, d.tail, 1 / d.rate / 1000000
    end
    dims[#dims + 1] = d
    arg = arg + 6
  end
  pools[p] = pool
end

-- The pools' part of the reply; what this call added to a day is counted.
local function reply(status, wait, reason, granted)
  local not_before = 0
  for _, pool in ipairs(pools) do not_before = math.max(not_before, pool.not_before) end
  local told = { status, int(now), int(not_before), int(wait), reason, granted }
  for p, pool in ipairs(pools) do
    local days = {}
    for _, d in ipairs(dims) do
      if d.q == 0 and d.place == p then
        for e, units in pairs(d.seen) do
          days[#days + 1] = string.format('%s:%.0f=%.0f;', d.id, e, units + (d.added[e] or 0))
        end
      end
    end
    told[#told + 1] = pool.incarnation
    told[#told + 1] = int(pool.last)
    told[#told + 1] = table.concat(days)
  end
  return told
end
if lost then return reply('lost', 0, '', '') end

for p, pool in ipairs(pools) do
  local expired = redis.call('ZRANGEBYSCORE', pool.LEASES, '-inf', int(now), 'LIMIT', 0, 1000)
  if #expired > 0 then
    redis.call('ZREM', pool.LEASES, unpack(expired))
    if p == 1 then redis.call('HDEL', RECEIPTS, unpack(expired)) end
  end
  pool.in_flight = redis.call('ZCARD', pool.LEASES)
end

-- Units in slot e, read ahead in chunks; what this very call added is not in Redis yet.
local function slot(d, e)
  if e >= d.loaded and e <= d.stored then
    local names, first = {}, d.loaded
    for k = first, math.min(e + CHUNK, d.stored) do names[#names + 1] = d.id .. ':' .. int(k) end
    local values = redis.call('HMGET', d.pool.SLOTS, unpack(names))
    for k = 1, #names do d.seen[first + k - 1] = tonumber(values[k] or '0') end
    d.loaded = first + #names
  end
  return (d.seen[e] or 0) + (d.added[e] or 0)
end

local function leaves_at(d, e) return (e + 1) * d.q + d.window end

local function day(d, e)
  if not d.seen[e] then d.seen[e] = tonumber(redis.call('HGET', d.pool.SLOTS, d.id .. ':' .. int(e)) or '0') end
  return d.seen[e] + (d.added[e] or 0)
end

-- The days for which a unit sent at `at` may count, as the provider's clock may differ from ours by the guard.
local function days_at(d, at)
  return math.floor((at + d.offset - d.guard) / d.window), math.floor((at + d.offset + d.guard) / d.window)
end

-- The earliest moment from `at` on that all gates of `d` allow.
local function earliest(d, cost, at)
  if d.q == 0 then
    local before, after = days_at(d, at)
    if day(d, before) + cost > d.units then at = math.max(at, (before + 1) * d.window - d.offset + d.guard) end
    if day(d, after) + cost > d.units then at = math.max(at, (after + 1) * d.window - d.offset + d.guard) end
    return at
  end
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

-- Takes the units and returns the parts of the receipt: pool/dimension, slot, cost, and window sum and level afterwards.
local function admit(d, cost, at)
  if d.q == 0 then
    local before, after = days_at(d, at)
    local parts = ''
    for e = before, after do
      day(d, e)
      d.added[e] = (d.added[e] or 0) + cost
      parts = parts .. (e > before and ';' or '') .. d.prefix .. int(e) .. ',' .. int(cost) .. ',0,0'
    end
    for back = 2, 4 do d.evicted[back - 1] = d.id .. ':' .. int(before - back) end
    return parts
  end
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
  return string.format('%s%.0f,%.0f,%.0f,%.0f', d.prefix, e, cost, d.sum, math.floor(d.level))
end

-- Runs of this batch, what each was given of every pool, and whether others wait for a pool elsewhere.
local mine, batched = {}, {}
for i = 1, nruns do
  mine[i] = { id = ARGV[arg], weight = tonumber(ARGV[arg + 1]), queue = {}, next = 1, shares = {} }
  batched[ARGV[arg]] = true
  arg = arg + 2
end
for p, pool in ipairs(pools) do
  local shares, virtual = {}, tonumber(pool.head[10] or '0')
  for run, service, till, who in string.gmatch(pool.head[9] or '', '([^|;]*)|([^|]*)|([^|]*)|([^;]*);') do
    local share = { service = tonumber(service), till = tonumber(till), asker = who }
    shares[run] = share
    if not batched[run] then
      -- This asker asked for it before and does no more.
      if who == asker then share.till = 0 end
      if share.till > now then pool.floor = math.min(pool.floor or share.service, share.service) end
    end
  end
  for i = 1, nruns do
    local share = shares[mine[i].id] or { service = 0, till = 0, asker = '' }
    if share.till <= now then share.service = math.max(share.service, virtual) end
    shares[mine[i].id], mine[i].shares[p] = share, share
  end
  pool.shares, pool.virtual, pool.idle_s = shares, virtual, pool.max > 0 and 1 / pool.max or 0.001
end

local ids, old, width = {}, {}, 4 + #dims
for i = 1, nreqs do
  local base = arg + (i - 1) * width
  ids[i] = ARGV[base]
  local queue = mine[tonumber(ARGV[base + 1])].queue
  queue[#queue + 1] = i
end
if nreqs > 0 then old = redis.call('HMGET', RECEIPTS, unpack(ids)) end

local function next_run()
  local found
  for _, run in ipairs(mine) do
    if run.queue[run.next] and not run.kept_by
      and (not found or run.shares[1].service < found.shares[1].service) then
      found = run
    end
  end
  return found
end

-- How far ahead of a waiting run a request may be sent that takes so many seconds of a pool's capacity.
local function lead_of(pool, seconds)
  if pool.max == 0 then return LEAD end
  return math.min(LEAD, 0.99 * seconds * math.max(1, pool.max / 4))
end

-- The first pool in which the run is too far ahead of others that wait for it.
local function unfair_in(run)
  for p, pool in ipairs(pools) do
    if pool.floor and run.shares[p].service > pool.floor + lead_of(pool, pool.seconds) then return p end
  end
end

local status, wait, reason, kept_by = 'ok', 0, '', 1
local granted, receipts, leases, costs = {}, {}, {}, {}
for i = 1, nreqs do granted[i] = '' end
-- All pools of a request share its send time, so after the first grant their last ones are the same.
local last, why_last, by_last, not_before, by_not_before, room, by_room = 0, '', 1, 0, 1, math.huge, 1
local foreign_at, foreign_why, by_foreign
for p, pool in ipairs(pools) do
  if pool.last > last then last, why_last, by_last = pool.last, pool.head[5] or '', p end
  if pool.not_before > not_before then not_before, by_not_before = pool.not_before, p end
  if pool.max > 0 and pool.max - pool.in_flight < room then room, by_room = pool.max - pool.in_flight, p end
  local owner, till, at, why = string.match(pool.head[6] or '', '^(.-)|(.-)|(.-)|(.*)$')
  pool.is_claimed = owner == asker
  if owner and owner ~= asker and tonumber(till) > now and tonumber(at) > (foreign_at or 0) then
    foreign_at, foreign_why, by_foreign = tonumber(at), why, p
  end
end
local run = next_run()
while run do
  local i = run.queue[run.next]
  local base = arg + (i - 1) * width
  if old[i] then
    local at, why = string.match(old[i], '^(.-);(.-);')
    granted[i] = at .. ':' .. why
    run.next = run.next + 1
  else
    if room <= 0 then
      status, reason, kept_by = 'refused', 'concurrency', by_room
      break
    end
    local at, why, by = now, '', 1
    if not_before > at then at, why, by = not_before, 'not_before', by_not_before end
    if last > at then at, why, by = last, why_last, by_last end
    for _, pool in ipairs(pools) do pool.seconds = 0 end
    for k = 1, #dims do
      local d, cost = dims[k], tonumber(ARGV[base + 3 + k])
      costs[k] = cost
      local t = earliest(d, cost, at)
      if t > at then at, why, by = t, d.why, d.place end
      if d.worth > 0 then d.pool.seconds = math.max(d.pool.seconds, cost * d.worth) end
    end
    for _, pool in ipairs(pools) do
      if pool.seconds == 0 then pool.seconds = pool.idle_s end
    end
    run.kept_by = unfair_in(run)
    if run.kept_by then
      -- Another run of this batch may be due.
      status, reason = 'refused', 'share'
    elseif by_foreign or at > now + tonumber(ARGV[base + 3]) then
      status, wait, reason, kept_by = 'refused', at - now, why, by
      if by_foreign then
        wait, reason, kept_by = math.max(wait, foreign_at - now), foreign_why, by_foreign
      elseif starved then
        -- Smaller requests of others would keep this one out for ever: the pool that is short waits for it now.
        redis.call('HSET', pools[by].STATE, 'claim', asker .. '|' .. int(now + 1500000) .. '|' .. int(at) .. '|' .. why)
        redis.call('PEXPIRE', pools[by].STATE, ttl)
      end
      break
    else
      local parts = { int(at), why }
      for k = 1, #dims do parts[2 + k] = admit(dims[k], costs[k], at) end
      last, why_last, room = at, why, room - 1
      for p, pool in ipairs(pools) do
        local share = run.shares[p]
        pool.virtual = math.max(pool.virtual, math.min(share.service, pool.floor or share.service))
        share.service = share.service + pool.seconds / run.weight
      end
      granted[i] = parts[1] .. ':' .. why
      receipts[#receipts + 1] = ids[i]
      receipts[#receipts + 1] = table.concat(parts, ';') .. ';'
      leases[#leases + 1] = int(at + tonumber(ARGV[base + 2]))
      leases[#leases + 1] = ids[i]
      run.next = run.next + 1
    end
  end
  run = next_run()
end

-- Who still waits keeps others back until it should have asked again.
local patience = now + 400000 + math.max(0, math.min(1000000, wait - 0.6 * horizon))
for p, pool in ipairs(pools) do
  for _, one in ipairs(mine) do
    local share = one.shares[p]
    if one.queue[one.next] and (one.kept_by or kept_by) == p then
      share.till, share.asker = patience, asker
    elseif share.asker == asker then
      share.till = 0
    end
  end
  local waiting = {}
  for id, share in pairs(pool.shares) do
    -- What is behind the virtual time starts there anyway.
    if share.till > now or share.service > pool.virtual then
      waiting[#waiting + 1] = string.format('%s|%.12g|%.0f|%s;', id, share.service, share.till, share.asker)
    end
  end
  local fields = { 'runs', table.concat(waiting), 'v', string.format('%.12g', pool.virtual) }
  if #receipts > 0 then
    for _, field in ipairs({ 'last', int(last), 'why', why_last }) do fields[#fields + 1] = field end
    pool.last = last
    for _, d in ipairs(dims) do
      if d.place == p then
        if d.q > 0 then
          fields[#fields + 1] = 'd:' .. d.id
          fields[#fields + 1] = string.format('%.17g|%.0f|%.0f|%.0f|%.0f|%.17g|%.17g', d.level, d.at, d.sum, d.first,
            d.tail, d.cap, d.rate)
        end
        for from = 1, #d.evicted, 1000 do
          redis.call('HDEL', pool.SLOTS, unpack(d.evicted, from, math.min(from + 999, #d.evicted)))
        end
        for e, units in pairs(d.added) do redis.call('HINCRBY', pool.SLOTS, d.id .. ':' .. int(e), int(units)) end
      end
    end
    redis.call('ZADD', pool.LEASES, unpack(leases))
    if pool.is_claimed then redis.call('HDEL', pool.STATE, 'claim') end
    for _, key in ipairs({ pool.SLOTS, pool.LEASES }) do redis.call('PEXPIRE', key, ttl) end
  end
  if #receipts > 0 or fields[2] ~= (pool.head[9] or '') then
    redis.call('HSET', pool.STATE, unpack(fields))
    redis.call('PEXPIRE', pool.STATE, ttl)
  end
end
if #receipts > 0 then
  redis.call('HSET', RECEIPTS, unpack(receipts))
  redis.call('PEXPIRE', RECEIPTS, ttl)
end
return reply(status, wait, reason, table.concat(granted, ';'))
