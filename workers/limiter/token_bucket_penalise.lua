-- Move a whole pool: nothing is sent before now + wait, by any process. Never moves the moment back.
--
-- Refusals that come in a wave mean that the provider allows less than it says, as it does while it ramps an account up: the
-- pool's share of its limits falls by a fifth per wave, and `token_bucket.lua` lets it rise again with every clean minute.
-- Fewer than three refusals in a minute of sending are the jitter of a network and cost nothing but the pause. So do those
-- that come while the pool is paused: they were on their way together with the first one, and have its cause.
--
-- KEYS  state hash
-- ARGV  1 wait (us), 2 ttl (ms)
-- Reply {now, the not-before moment in force (us), share of the limits in force}
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local MINUTE, APART, LEAST, CUT, RECOVERY, WAVE = 60000000, 10000000, 0.3, 0.8, 0.02, 3
local head = redis.call('HMGET', KEYS[1], 'nb', 'f', 'f_at', 'cut', 'wave', 'wave_at')
local paused_until = tonumber(head[1] or '0')
local moment = math.max(paused_until, now + tonumber(ARGV[1]))
local factor, since, cut = tonumber(head[2] or '1'), tonumber(head[3] or '0'), tonumber(head[4] or '0')
factor = math.min(1, factor + RECOVERY * math.floor(math.max(0, now - since) / MINUTE))
local refusals, first = tonumber(head[5] or '0'), tonumber(head[6] or '0')
if now >= paused_until then
  refusals = refusals + 1
  if now - first > MINUTE then refusals, first = 1, now end
end
-- Pauses are no time of sending.
first = first + moment - math.max(now, paused_until)
if refusals >= WAVE and now - cut > APART then
  factor, cut, refusals, first = math.max(LEAST, factor * CUT), now, 0, now
end
redis.call('HSET', KEYS[1], 'nb', string.format('%.0f', moment), 'f', string.format('%.9g', factor),
  'f_at', string.format('%.0f', now), 'cut', string.format('%.0f', cut), 'wave', refusals,
  'wave_at', string.format('%.0f', first))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {string.format('%.0f', now), string.format('%.0f', moment), string.format('%.4f', factor)}
