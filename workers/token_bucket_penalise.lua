-- Move a whole pool: nothing is sent before now + wait, by any process. Never moves the moment back.
--
-- KEYS  state hash
-- ARGV  1 wait (us), 2 ttl (ms)
-- Reply the not-before moment in force (us)
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local moment = math.max(tonumber(redis.call('HGET', KEYS[1], 'nb') or '0'), now + tonumber(ARGV[1]))
redis.call('HSET', KEYS[1], 'nb', string.format('%.0f', moment))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {string.format('%.0f', now), string.format('%.0f', moment)}
