-- Removes the hashes from KEYS[4] on and logs each that was there under a number of its own.
-- Numbers are the server's time in ms, made to rise. Answer: series, number, series, number ...
local last = tonumber(call('HGET', SEQ, 'deletes') or '0')
local number = math.max(now_ms() - 1, last)
local removed = {}
for i = 4, #KEYS do
  if call('UNLINK', KEYS[i]) == 1 then
    -- 'prefix:{017}:seq' is as long as what stands before the series in 'prefix:{017}:s:<series>', less one.
    local series = string.sub(KEYS[i], #SEQ)
    number = number + 1
    call('ZREM', INDEX, series)
    call('ZADD', DEL, whole(number), series)
    removed[#removed + 1] = series
    removed[#removed + 1] = whole(number)
  end
end
if #removed > 0 then
  call('HSET', SEQ, 'deletes', whole(number))
end
return removed
