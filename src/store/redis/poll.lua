-- What an agent without batches asks for: the deletes since the last it knows, and whether the store still has what it
-- had: a failover may have lost it.
-- ARGV: agent, deletes seen, expiry in ms. Answer: stored sequence, samples up to it, time, series expired, deletes.
local agent, seen, expire_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local stored = call('HMGET', SEQ, agent, agent .. ':seen', agent .. ':samples')
note_seen(agent, stored[2], seen)
local now = now_ms()
return {stored[1] or '0', stored[3] or '0', now, trim(now, expire_ms), deletes(seen)}
