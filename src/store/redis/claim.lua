-- Makes a new nonce the owner of an agent's sequence, unless somebody else has taken the agent's name.
-- ARGV: agent, new nonce or '' to claim nothing, expiry in ms, deletes seen or '', what the claimer inherited, nonces that
-- the agent's journal knows ...
-- Answer: 'clone' and what the owner inherited; or 'claimed', stored sequence, deletes seen, time, series expired, deletes, samples up to the sequence.
local agent, nonce, expire_ms, seen, inherited = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]

local stored = call('HMGET', SEQ, agent, agent .. ':owner', agent .. ':seen', 'deletes', agent .. ':samples',
  agent .. ':inherited')
local owner = stored[2]
local known = not owner or owner == nonce
for i = 6, #ARGV do
  known = known or owner == ARGV[i]
end
if not known or nonce == '' then
  return {'clone', stored[6] or ''}
end

call('HSET', SEQ, agent .. ':owner', nonce, agent .. ':inherited', inherited)
if seen == '' then
  -- A name that was never here has no ledger from before the last delete.
  seen = stored[3] or stored[4] or '0'
end
note_seen(agent, stored[3], seen)
local now = now_ms()
local expired = trim(now, expire_ms)
return {'claimed', stored[1] or '0', seen, now, expired, deletes(seen), stored[5] or '0'}
